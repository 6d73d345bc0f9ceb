"""The compiled CPU kernels: built once from ``cpu.cpp`` with the machine's own C++ compiler.

The library is kept in ``$BITPLAN_CACHE``, or ``bitplan`` in the user's cache folder, under a name
that depends on source, compiler and processor.  It is called through ctypes and needs no headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from functools import cache
from pathlib import Path

import torch

from .._base.files import atomic_path

SOURCE = Path(__file__).with_name("cpu.cpp")
SOURCES = (SOURCE, SOURCE.with_name("cpu_decode.h"))
ABI = 2  # what bitplan_abi() says
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 600  # seconds
_lock = threading.Lock()


class NativeWeight(ctypes.Structure):
    """``Weight`` of ``cpu.cpp``."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("log_group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("per_tensor", ctypes.c_int32),
        ("levels", ctypes.c_void_p),
    )


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, after one warning that says why, where there are none."""
    with _lock:
        loaded, reason = _library()
    if reason:
        _warn(reason)
    return loaded


def unavailable() -> str | None:
    """Why there are no compiled kernels; None where there are."""
    with _lock:
        return _library()[1] or None


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason} Packed layers keep a dequantized copy of their weights in memory on this CPU. "
        "BITPLAN_KERNEL=reference unpacks them at every call instead: small, but slow.",
        stacklevel=4,
    )


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    compiler = _compiler()
    if compiler is None:
        chosen = os.environ.get("CXX")
        looked = f"$CXX is {chosen!r}" if chosen else f"looked for {', '.join(_COMPILERS)}"
        return None, (
            f"No C++ compiler was found ({looked}), so the CPU kernels cannot be built. Install "
            "one, for example with 'apt install g++'."
        )
    try:
        path = cache_folder() / f"cpu-{_key(compiler)}.so"
        if path.is_file():
            try:
                return _load(path), ""
            except OSError:  # damaged, or of a machine that has other libraries: built again
                path.unlink(missing_ok=True)
        print(
            f"bitplan: compiling the CPU kernels with {Path(compiler).name}, once, in less than a "
            f"minute; they are kept in {path.parent}",
            file=sys.stderr,
            flush=True,
        )
        return _build(compiler, path), ""
    except PermissionError as error:
        return None, (
            f"The CPU kernels cannot be kept ({error}). Set BITPLAN_CACHE to a folder that can be "
            "written."
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        first = next((line for line in detail.splitlines() if "error" in line), detail[:300])
        return None, f"The CPU kernels could not be built with {compiler} ({first.strip()})."


def cache_folder() -> Path:
    """For what is made on this machine: ``$BITPLAN_CACHE``, or ``bitplan`` in the user's cache."""
    if chosen := os.environ.get("BITPLAN_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bitplan"


def _compiler() -> str | None:
    """``$CXX`` if it is set, else the first compiler there is; None if there is none."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen)
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def _key(compiler: str) -> str:
    """Names the library: other source, flags, compiler or processor, other name."""
    sources = [path.read_text(encoding="utf-8") for path in SOURCES]
    parts = (*sources, *_FLAGS, _run([compiler, "--version"]), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    kinds = {line for line in lines if line.partition(":")[0].strip() in {"flags", "Features"}}
    return "\0".join([platform.system(), platform.machine(), *sorted(kinds or lines[:1])])


def _build(compiler: str, path: Path) -> ctypes.CDLL:
    """Compile to ``path``; OpenMP is that of torch where it can be, for one pool of threads."""
    native = "-mcpu=native" if platform.machine() in {"arm64", "aarch64"} else "-march=native"
    failures: list[Exception] = []
    for compiling, linking in ((["-fopenmp"], []), (["-fopenmp"], ["-fopenmp"]), ([], [])):
        with tempfile.TemporaryDirectory() as folder:
            unit, built = str(Path(folder) / "cpu.o"), str(Path(folder) / "cpu.so")
            try:
                _run([compiler, *_FLAGS, native, *compiling, "-c", str(SOURCE), "-o", unit])
                _run([compiler, "-shared", unit, *linking, "-o", built])
                _load(Path(built))
            except (OSError, subprocess.CalledProcessError) as error:
                failures.append(error)
                continue
            with atomic_path(path) as temporary:
                shutil.copyfile(built, temporary)
            return _load(path)
    raise failures[0]


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_TIMEOUT
    ).stdout


def _load(path: Path) -> ctypes.CDLL:
    torch.get_num_threads()  # torch, and with it its OpenMP, is loaded
    loaded = ctypes.CDLL(str(path))
    if loaded.bitplan_abi() != ABI:
        raise OSError(f"{path} is of another version")
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.bitplan_linear.argtypes = (pointer, pointer, int32, int64, pointer, pointer, int32)
    loaded.bitplan_linear.restype = None
    loaded.bitplan_unpack.argtypes = (pointer, pointer, int64, int64, pointer, int32)
    loaded.bitplan_unpack.restype = None
    return loaded

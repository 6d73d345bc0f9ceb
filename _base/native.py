"""Libraries compiled from our own C++, once, with the machine's own compiler.

A library is kept in ``$BITPLAN_CACHE``, or ``bitplan`` in the user's cache folder, under a name
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .files import atomic_path

_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 600  # seconds


class Library:
    """A library of ours, compiled when it is first asked for.

    Args:
        title: What it holds, for messages: ``CPU kernels``.
        sources: The file to compile, and those that it includes.
        abi: What its ``bitplan_abi()`` must return.
        declare: Says what its functions take and return.
    """

    def __init__(
        self, title: str, sources: Sequence[Path], abi: int, declare: Callable[[ctypes.CDLL], None]
    ) -> None:
        self.title, self.sources, self.abi, self.declare = title, tuple(sources), abi, declare
        self.name = self.sources[0].stem
        self._lock = threading.Lock()
        self._found: tuple[ctypes.CDLL | None, str] | None = None

    def find(self) -> tuple[ctypes.CDLL | None, str]:
        """The library and an empty reason, or None and the reason why there is none."""
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def forget(self) -> None:
        """Look again the next time."""
        with self._lock:
            self._found = None

    def path(self, compiler: str) -> Path:
        """Where it is kept: other source, flags, compiler or processor, other name."""
        sources = [path.read_text(encoding="utf-8") for path in self.sources]
        parts = (*sources, *_FLAGS, _run([compiler, "--version"]), _processor())
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
        return cache_folder() / f"{self.name}-{key}.so"

    def _find(self) -> tuple[ctypes.CDLL | None, str]:
        compiler = find_compiler()
        if compiler is None:
            chosen = os.environ.get("CXX")
            looked = f"$CXX is {chosen!r}" if chosen else f"looked for {', '.join(_COMPILERS)}"
            return None, (
                f"No C++ compiler was found ({looked}), so the {self.title} cannot be built. "
                "Install one, for example with 'apt install g++'."
            )
        try:
            path = self.path(compiler)
            if path.is_file():
                try:
                    return self._load(path), ""
                except OSError:  # damaged, or of a machine with other libraries: built again
                    path.unlink(missing_ok=True)
            print(
                f"bitplan: compiling the {self.title} with {Path(compiler).name}, once, in less "
                f"than a minute; they are kept in {path.parent}",
                file=sys.stderr,
                flush=True,
            )
            return self._build(compiler, path), ""
        except PermissionError as error:
            return None, (
                f"The {self.title} cannot be kept ({error}). Set BITPLAN_CACHE to a folder that "
                "can be written."
            )
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            first = next((line for line in detail.splitlines() if "error" in line), detail[:300])
            return None, f"The {self.title} could not be built with {compiler} ({first.strip()})."

    def _build(self, compiler: str, path: Path) -> ctypes.CDLL:
        """Compile to ``path``; OpenMP is that of torch where it can be, for one pool of threads."""
        native = "-mcpu=native" if platform.machine() in {"arm64", "aarch64"} else "-march=native"
        failures: list[Exception] = []
        for compiling, linking in ((["-fopenmp"], []), (["-fopenmp"], ["-fopenmp"]), ([], [])):
            with tempfile.TemporaryDirectory() as folder:
                unit, built = (str(Path(folder) / f"{self.name}.{end}") for end in ("o", "so"))
                source = str(self.sources[0])
                try:
                    _run([compiler, *_FLAGS, native, *compiling, "-c", source, "-o", unit])
                    _run([compiler, "-shared", unit, *linking, "-o", built])
                    self._load(Path(built))
                except (OSError, subprocess.CalledProcessError) as error:
                    failures.append(error)
                    continue
                with atomic_path(path) as temporary:
                    shutil.copyfile(built, temporary)
                return self._load(path)
        raise failures[0]

    def _load(self, path: Path) -> ctypes.CDLL:
        torch.get_num_threads()  # torch, and with it its OpenMP, is loaded
        loaded = ctypes.CDLL(str(path))
        if loaded.bitplan_abi() != self.abi:
            raise OSError(f"{path} is of another version")
        self.declare(loaded)
        return loaded


def cache_folder() -> Path:
    """For what is made on this machine: ``$BITPLAN_CACHE``, or ``bitplan`` in the user's cache."""
    if chosen := os.environ.get("BITPLAN_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bitplan"


def find_compiler() -> str | None:
    """``$CXX`` if it is set, else the first compiler there is; None if there is none."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen)
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def _processor() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    kinds = {line for line in lines if line.partition(":")[0].strip() in {"flags", "Features"}}
    return "\0".join([platform.system(), platform.machine(), *sorted(kinds or lines[:1])])


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_TIMEOUT
    ).stdout

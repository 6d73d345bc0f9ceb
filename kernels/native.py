"""The compiled CPU kernels: built once from ``cpu.cpp``, see ``_base/native.py``."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path

from .._base.native import Library

SOURCE = Path(__file__).with_name("cpu.cpp")
ABI = 2  # what bitplan_abi() says


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
    loaded, reason = LIBRARY.find()
    if reason:
        _warn(reason)
    return loaded


def unavailable() -> str | None:
    """Why there are no compiled kernels; None where there are."""
    return LIBRARY.find()[1] or None


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason} Packed layers keep a dequantized copy of their weights in memory on this CPU. "
        "BITPLAN_KERNEL=reference unpacks them at every call instead: small, but slow.",
        stacklevel=4,
    )


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.bitplan_linear.argtypes = (pointer, pointer, int32, int64, pointer, pointer, int32)
    loaded.bitplan_linear.restype = None
    loaded.bitplan_unpack.argtypes = (pointer, pointer, int64, int64, pointer, int32)
    loaded.bitplan_unpack.restype = None


LIBRARY = Library("CPU kernels", (SOURCE, SOURCE.with_name("cpu_decode.h")), ABI, _declare)

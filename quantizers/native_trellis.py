"""The compiled walks of ``trellis.cpp``: what ``trellis.py`` does, for weights on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .._base.native import Library

SOURCE = Path(__file__).with_name("trellis.cpp")
ABI = 1  # what bitplan_abi() says


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("feedback", "matrix", "weight", "scale", "counts")),
        *((name, ctypes.c_void_p) for name in ("table", "codes")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "tile")),
        *((name, ctypes.c_int32) for name in ("start", "passes", "given")),
    )


def walk(
    loaded: ctypes.CDLL,
    weight: Tensor,
    scale: Tensor,
    counts: Tensor,
    table: Tensor,
    codes: Tensor,
    bits: int,
    tile: int,
    start: int,
    feedback: Tensor | None,
    matrix: Tensor | None,
    passes: int,
    given: bool,
) -> None:
    """See ``trellis.choose``; everything contiguous, ``codes`` are changed in place."""
    parts = (feedback, matrix, weight, scale, counts, table, codes)
    addresses = []
    for part in parts:
        assert part is None or part.is_contiguous()
        addresses.append(None if part is None else part.data_ptr())
    problem = _Problem(*addresses, *weight.shape, tile, start, passes, given)
    loaded.bitplan_trellis(ctypes.byref(problem), bits, torch.get_num_threads())


def _declare(loaded: ctypes.CDLL) -> None:
    function = loaded.bitplan_trellis
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int), None


LIBRARY = Library("trellis walks", (SOURCE,), ABI, _declare)

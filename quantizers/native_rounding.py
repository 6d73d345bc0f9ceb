"""The compiled loops of ``rounding.cpp``: what ``rounding.py`` does, for weights on a CPU."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .._base.native import Library
from .feedback import Quadratic
from .sweep import Lattice, Levels

SOURCE = Path(__file__).with_name("rounding.cpp")
HEADER = Path(__file__).with_name("rounding_types.h")
ABI = 2  # what bitplan_abi() says


class _Problem(ctypes.Structure):
    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("pivots", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
    )


class _Lines(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("borders", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("most", ctypes.c_int32),
        ("fit", ctypes.c_int32),
        ("pairs", ctypes.c_int32),
    )


class _Search(ctypes.Structure):
    _fields_ = (
        ("ratios", ctypes.c_void_p),
        ("ratio_count", ctypes.c_int32),
        ("refinements", ctypes.c_int32),
    )


def library(weight: Tensor) -> ctypes.CDLL | None:
    """The compiled loops, if the weight is on a CPU and they can be built."""
    if weight.device.type != "cpu":
        return None
    loaded, reason = LIBRARY.find()
    if reason:
        warn(reason)
    return loaded


@cache
def warn(reason: str) -> None:
    """Say once why there are no compiled loops."""
    warnings.warn(
        f"{reason} Rounding takes several times as long without them.",
        stacklevel=4,
    )


def sweep(
    loaded: ctypes.CDLL,
    weight: Tensor,
    quadratic: Quadratic,
    lattice: Lattice,
    search: tuple[Sequence[float], int] | None,
    symmetric: bool,
) -> Tensor:
    """See ``rounding.sweep``; the lattice's scales and zero points are filled in by a search."""
    weight = weight.contiguous()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    with_fit = 0 if search is None else 2 if symmetric else 1
    lines = _StoredLines(lattice, with_fit)
    ratios, refinements = search or ((), 0)
    held = torch.tensor(ratios, dtype=torch.float32)
    how = _Search(held.data_ptr(), len(held), refinements)
    problem = _Problem(
        quadratic.back.data_ptr(),
        quadratic.order.data_ptr(),
        quadratic.pivots.data_ptr(),
        *_shape(weight, quadratic),
    )
    loaded.bitplan_sweep(
        ctypes.byref(problem),
        ctypes.byref(lines.lines),
        ctypes.byref(how),
        weight.data_ptr(),
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    return codes


def slope(loaded: ctypes.CDLL, error: Tensor, quadratic: Quadratic) -> Tensor:
    """See ``rounding.slope``."""
    error, result = error.contiguous(), torch.empty(error.shape)
    problem = _of_matrix(error, quadratic)
    loaded.bitplan_slope(
        ctypes.byref(problem), error.data_ptr(), result.data_ptr(), torch.get_num_threads()
    )
    return result


def normal(
    loaded: ctypes.CDLL, basis: Tensor, quadratic: Quadratic, spans: int, size: int
) -> Tensor:
    """B H B^T [rows, spans, spans], B of a row its basis [cols] in spans of ``size`` columns."""
    basis, result = basis.contiguous(), torch.empty(len(basis), spans, spans)
    problem = _of_matrix(basis, quadratic)
    loaded.bitplan_normal(
        ctypes.byref(problem),
        spans,
        size,
        basis.data_ptr(),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def descend(
    loaded: ctypes.CDLL,
    codes: Tensor,
    slope: Tensor,
    quadratic: Quadratic,
    lattice: Lattice,
    sweeps: int,
) -> None:
    """See ``rounding.descend``: changes ``codes`` and ``slope``, which must be contiguous."""
    lines, problem = _StoredLines(lattice, 0), _of_matrix(slope, quadratic)
    pull = quadratic.matrix.diagonal(dim1=1, dim2=2).reciprocal().contiguous()
    problem.pivots = pull.data_ptr()
    loaded.bitplan_descend(
        ctypes.byref(problem),
        ctypes.byref(lines.lines),
        sweeps,
        codes.data_ptr(),
        slope.data_ptr(),
        torch.get_num_threads(),
    )


class _StoredLines:
    """``Lines`` of ``rounding.cpp``, and the tensors whose addresses it holds."""

    def __init__(self, lattice: Lattice, fit: int) -> None:
        ordered: tuple[Tensor | None, ...] = (None, None, None)
        if lattice.pairs and lattice.levels is not None:
            ordered = (lattice.levels.contiguous(), None, None)
        elif levels := Levels.of(lattice.levels):
            ordered = levels
        self.kept = (lattice.scale, lattice.zero, lattice.offset, *ordered)
        addresses = []
        for part in self.kept:
            assert part is None or part.is_contiguous()
            addresses.append(None if part is None else part.data_ptr())
        scale, zero, offset, values, names, borders = addresses
        self.lines = _Lines(
            scale,
            zero,
            offset,
            values,
            borders,
            names,
            lattice.scale.shape[1],
            lattice.size,
            2**lattice.bits - 1,
            fit,
            lattice.pairs,
        )


def _of_matrix(rows: Tensor, quadratic: Quadratic) -> _Problem:
    return _Problem(quadratic.matrix.data_ptr(), None, None, *_shape(rows, quadratic))


def _shape(rows: Tensor, quadratic: Quadratic) -> tuple[int, int, int]:
    """Parts, rows of a part, columns."""
    parts = len(quadratic.order)
    return parts, len(rows) // parts, rows.shape[1]


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    arguments = {
        "sweep": (pointer,) * 5 + (int32,),
        "slope": (pointer,) * 3 + (int32,),
        "normal": (pointer, int64, int64, pointer, pointer, int32),
        "descend": (pointer, pointer, int32, pointer, pointer, int32),
    }
    for name, types in arguments.items():
        function = getattr(loaded, f"bitplan_{name}")
        function.argtypes, function.restype = types, None


LIBRARY = Library("rounding loops", (SOURCE, HEADER), ABI, _declare)

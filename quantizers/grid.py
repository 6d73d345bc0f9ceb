"""Grids: the scales and zero points of a format, and the weights they can represent.

What codes stand for is in ``lines``; here a format's family is asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, overload

import torch
from torch import Tensor

from .format import Fitted, Format, family_of
from .lines import (
    CHUNK,
    Grid,
    Line,
    dequantize,
    exponent,
    grouped,
    nearest_level,
    round_to_codes,
    row_chunks,
)

__all__ = [
    "CHUNK",
    "Grid",
    "Line",
    "decode",
    "encode",
    "exponent",
    "grid_rows",
    "group_blocks",
    "line_of",
    "nearest_level",
    "render",
    "row_chunks",
]

Some = TypeVar("Some", bound=Fitted)


@overload
def grid_rows(grid: Some, rows: slice | Tensor) -> Some: ...
@overload
def grid_rows(grid: None, rows: slice | Tensor) -> None: ...
@overload
def grid_rows(grid: Some | None, rows: slice | Tensor) -> Some | None: ...
def grid_rows(grid: Some | None, rows: slice | Tensor) -> Some | None:
    """The grid of some rows of a weight, or whatever else its family keeps of them."""
    return None if grid is None else grid.rows(rows)


def render(weight: Tensor, fmt: Format, grid: Fitted | None, out: Tensor | None = None) -> Tensor:
    """The weight as a format represents it: s * (clamp(round(w/s + z), 0, 2^b - 1) - z).

    Equal to ``decode(encode(weight))`` and ``PackedTensor.pack(...).dequantize()`` bit for bit,
    for any rows with the grid of these rows.  A group with scale 0 renders to 0.

    Args:
        weight: The original weight [rows, cols], float32.
        fmt: The format.
        grid: Its scales and zero points, or what else its family keeps (``Family.fit``); None for
            a float format, which only casts.
        out: Where to put the result, float32 [rows, cols]; may be ``weight`` itself.

    Returns:
        The dequantized weight [rows, cols], float32.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    family_of(fmt).render(weight, fmt, grid, out)
    return out


def encode(weight: Tensor, fmt: Format, grid: Grid) -> Tensor:
    """The codes, uint8 [rows, cols], of a weight [rows, cols] in a format of codes alone."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(weight.shape):
        line = line_of(fmt, grid.rows(rows))
        rounded = torch.empty(weight[rows].shape, dtype=torch.float32, device=weight.device)
        round_to_codes(weight[rows], line, fmt.bits, fmt.group_size, rounded)
        codes[rows] = rounded.to(torch.uint8)
    return codes


def decode(codes: Tensor, fmt: Format, grid: Grid, out: Tensor | None = None) -> Tensor:
    """The weight, float32 [rows, cols], that codes [rows, cols] stand for; ``out`` receives it."""
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows in row_chunks(codes.shape):
        some = out[rows].copy_(codes[rows])
        dequantize(some, line_of(fmt, grid.rows(rows)), fmt.group_size)
    return out


def group_blocks(matrix: Tensor, fmt: Format) -> Iterator[tuple[Tensor, slice]]:
    """Views [rows, groups, group_size] of a [rows, cols] matrix, with their groups' indices.

    One view, or two when the last group is short: the full groups, then the short one.
    """
    return grouped(matrix, fmt.group_size)


def line_of(fmt: Format, grid: Grid) -> Line:
    """The line of every group that a grid of a format means."""
    return family_of(fmt).line(fmt, grid)

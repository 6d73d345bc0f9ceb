"""Grids: the scales and zero points of a format, and the weights they can represent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .format import Format

FLOAT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHUNK = 1 << 20  # weights handled at a time, so that temporaries stay in the cache


class Grid(NamedTuple):
    """The representable values s * (c - z), c = 0 ... 2^b - 1, of every group of a weight.

    Attributes:
        scale: The scales s [rows, groups], or [1, 1] for a per-tensor format; float16.
        zero: The zero points z, shaped like ``scale``, uint8; None for a symmetric format.
    """

    scale: Tensor
    zero: Tensor | None


@overload
def grid_rows(grid: Grid, rows: slice | Tensor) -> Grid: ...
@overload
def grid_rows(grid: None, rows: slice | Tensor) -> None: ...
def grid_rows(grid: Grid | None, rows: slice | Tensor) -> Grid | None:
    """The grid of some rows of a weight; a per-tensor grid is the same for all rows."""
    if grid is None or grid.scale.shape[0] == 1:
        return grid
    return Grid(grid.scale[rows], None if grid.zero is None else grid.zero[rows])


def render(weight: Tensor, fmt: Format, grid: Grid | None, out: Tensor | None = None) -> Tensor:
    """The weight as a format represents it: s * (clamp(round(w/s + z), 0, 2^b - 1) - z).

    Equal to ``decode(encode(weight))`` bit for bit.  A group with scale 0 renders to 0.

    Args:
        weight: The original weight [rows, cols], float32.
        fmt: The format.
        grid: Its scales and zero points; None for a float format, which only casts.
        out: Where to put the result, float32 [rows, cols]; may be ``weight`` itself.

    Returns:
        The dequantized weight [rows, cols], float32.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if grid is None:
        return out.copy_(weight.to(FLOAT_DTYPES[fmt.name]))
    for rows in row_chunks(weight.shape):
        part = grid_rows(grid, rows)
        _round_to_codes(weight[rows], fmt, part, out[rows])
        _dequantize(out[rows], fmt, part)
    return out


def encode(weight: Tensor, fmt: Format, grid: Grid) -> Tensor:
    """The codes, uint8 [rows, cols], of a weight [rows, cols] in an integer format."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(weight.shape):
        part = grid_rows(grid, rows)
        rounded = torch.empty(weight[rows].shape, dtype=torch.float32, device=weight.device)
        _round_to_codes(weight[rows], fmt, part, rounded)
        codes[rows] = rounded.to(torch.uint8)
    return codes


def decode(codes: Tensor, fmt: Format, grid: Grid, out: Tensor | None = None) -> Tensor:
    """The weight, float32 [rows, cols], that codes [rows, cols] stand for; ``out`` receives it."""
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    _dequantize(out.copy_(codes), fmt, grid)
    return out


def row_chunks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices over the rows of a [rows, cols] matrix that hold about ``CHUNK`` weights each."""
    rows, cols = shape
    step = max(1, CHUNK // max(1, cols))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def group_blocks(matrix: Tensor, fmt: Format) -> Iterator[tuple[Tensor, slice]]:
    """Views [rows, groups, group_size] of a [rows, cols] matrix, with their groups' indices.

    One view, or two when the last group is short: the full groups, then the short one.
    """
    rows, cols = matrix.shape
    size = fmt.group_size if fmt.group_size > 0 else cols
    full, rest = divmod(cols, size)
    if full:
        yield matrix[:, : full * size].view(rows, full, size), slice(0, full)
    if rest:
        yield matrix[:, full * size :].unsqueeze(1), slice(full, full + 1)


def _round_to_codes(weight: Tensor, fmt: Format, grid: Grid, out: Tensor) -> None:
    """Write the codes of ``weight`` to ``out``, both [rows, cols], as float32."""
    scale = grid.scale.float()
    inverse = torch.where(scale == 0, 0, 1 / scale)
    for (block, groups), (codes, _) in zip(
        group_blocks(weight.detach(), fmt), group_blocks(out, fmt), strict=True
    ):
        torch.mul(block, inverse[:, groups, None], out=codes)
        codes.add_(_zero(fmt, grid, groups)).round_().clamp_(0, 2**fmt.bits - 1)


def _dequantize(codes: Tensor, fmt: Format, grid: Grid) -> None:
    """Turn float32 codes [rows, cols] into s * (c - z) in place; exact, as s is a float16."""
    for block, groups in group_blocks(codes, fmt):
        block.sub_(_zero(fmt, grid, groups)).mul_(grid.scale[:, groups, None].float())


def _zero(fmt: Format, grid: Grid, groups: slice) -> Tensor:
    if grid.zero is None:
        return torch.tensor(fmt.zero_point)
    return grid.zero[:, groups, None].float()

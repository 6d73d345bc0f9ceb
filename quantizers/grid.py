"""Grids: the scales and zero points of a format, and the weights they can represent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .blocks import layouts
from .format import Format

FLOAT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHUNK = 1 << 20  # weights handled at a time, so that temporaries stay in the cache


class Grid(NamedTuple):
    """The representable values s * (c - z), c = 0 ... 2^b - 1, of every group of a weight.

    A block format has two scales, of the block and of a group in it; ``blocks.Layout`` says what
    they amount to.

    Attributes:
        scale: The scales s [rows, groups], or [1, 1] for a per-tensor format; float16.  Of a block
            format, those of the blocks [rows, blocks], or their exponents, uint8.
        zero: The zero points z, shaped like ``scale``, uint8; None for a symmetric format.  Of a
            block format, minimums or the scale of minimums [rows, blocks], float16.
        scales: Of a block format, scales of the groups [rows, groups], uint8, as stored.
        mins: Likewise the minimums of the groups.
    """

    scale: Tensor
    zero: Tensor | None
    scales: Tensor | None = None
    mins: Tensor | None = None


@overload
def grid_rows(grid: Grid, rows: slice | Tensor) -> Grid: ...
@overload
def grid_rows(grid: None, rows: slice | Tensor) -> None: ...
def grid_rows(grid: Grid | None, rows: slice | Tensor) -> Grid | None:
    """The grid of some rows of a weight; a per-tensor grid is the same for all rows."""
    if grid is None or grid.scale.shape[0] == 1:
        return grid
    rest = (None if part is None else part[rows] for part in grid[1:])
    return Grid(grid.scale[rows], *rest)


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
    line = line_of(fmt, grid)
    inverse = torch.where(line.scale == 0, 0, 1 / line.scale)
    for (block, groups), (codes, _) in zip(
        group_blocks(weight.detach(), fmt), group_blocks(out, fmt), strict=True
    ):
        if line.offset is None:
            torch.mul(block, inverse[:, groups, None], out=codes)
        else:
            torch.sub(block, line.offset[:, groups, None], out=codes)
            codes.mul_(inverse[:, groups, None])
        if line.levels is None:
            codes.add_(_zero(line, groups)).round_().clamp_(0, 2**fmt.bits - 1)
        else:
            codes.copy_(nearest_level(codes, line.levels))


def _dequantize(codes: Tensor, fmt: Format, grid: Grid) -> None:
    """Turn float32 codes [rows, cols] into weights in place.

    Exact but for the addition of a minimum: codes, scales and their products have few bits.
    """
    line = line_of(fmt, grid)
    for block, groups in group_blocks(codes, fmt):
        if line.levels is None:
            block.sub_(_zero(line, groups)).mul_(line.scale[:, groups, None])
        else:
            block.copy_(line.levels[block.long()]).mul_(line.scale[:, groups, None])
        if line.offset is not None:
            block.add_(line.offset[:, groups, None])


class Line(NamedTuple):
    """How codes of a group become weights: scale * (c - zero) + offset.

    Attributes:
        scale: float32 [rows, groups], or [1, 1].
        zero: Zero points, shaped like ``scale``, or one for all (a scalar).
        offset: float32 [rows, groups]; None for 0.
        levels: What stands for a code instead of c - zero, float32 [2^b]; None for c - zero.
    """

    scale: Tensor
    zero: Tensor
    offset: Tensor | None = None
    levels: Tensor | None = None


def line_of(fmt: Format, grid: Grid) -> Line:
    """The line of every group that a grid of a format means."""
    if fmt.kind != "block":
        zero = torch.tensor(fmt.zero_point) if grid.zero is None else grid.zero.float()
        return Line(grid.scale.float(), zero)
    layout = layouts()[fmt.name]
    scale = exponent(grid.scale) if grid.scale.dtype == torch.uint8 else grid.scale.float()
    offset = None if grid.zero is None else grid.zero.float()
    per_block = fmt.block_size // fmt.group_size
    if grid.scales is not None:
        scale = scale.repeat_interleave(per_block, 1) * (grid.scales.float() - layout.bias)
    if grid.mins is not None and offset is not None:
        offset = -(offset.repeat_interleave(per_block, 1) * grid.mins.float())
    levels = None
    if layout.levels is not None:
        levels = torch.tensor(layout.levels, dtype=torch.float32, device=scale.device)
    return Line(scale, torch.tensor(float(layout.zero)), offset, levels)


def exponent(stored: Tensor) -> Tensor:
    """Powers of two, float32, for the E8M0 exponents of levels in halves: 2^(e - 128)."""
    return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 128)


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Codes, float32, of the levels nearest to ``values``; of two equally near, the larger level.

    Levels are whole numbers from -128 to 127, so half-way between two is a multiple of 1/2: a
    table of all halves replaces a search.
    """
    ordered, order = levels.sort(stable=True)
    halves = torch.arange(512, device=levels.device) / 2 - 128
    table = order[torch.bucketize(halves, (ordered[1:] + ordered[:-1]) / 2, right=True)].float()
    return table[values.clamp(-128, 127.5).add_(128).mul_(2).int()]


def _zero(line: Line, groups: slice) -> Tensor:
    return line.zero[:, groups, None] if line.zero.dim() else line.zero

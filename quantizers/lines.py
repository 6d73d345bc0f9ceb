"""Lines and grids: how codes of a group become weights, and how weights become codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .pairs import nearest_points, values_of

CHUNK = 1 << 20  # weights handled at a time, so that temporaries stay in the cache
SLIGHT = 1e-6  # what groups without importance count beside those that have some


class Grid(NamedTuple):
    """The representable values s * (c - z), c = 0 ... 2^b - 1, of every group of a weight.

    A block format has two scales, of the block and of a group in it; ``blocks.Layout`` says what
    they amount to.  Where codes stand for levels, those take the place of c - z.

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

    def rows(self, rows: slice | Tensor) -> Grid:
        """The grid of some rows of the weight; a per-tensor grid is the same for all rows."""
        if self.scale.shape[0] == 1:
            return self
        rest = (None if part is None else part[rows] for part in self[1:])
        return Grid(self.scale[rows], *rest)

    @staticmethod
    def joined(grids: Sequence[Grid]) -> Grid:
        """The grid of the rows of all, one after the other."""
        columns = [
            [part for part in column if part is not None] for column in zip(*grids, strict=True)
        ]
        scale, *rest = (torch.cat(column) if column else None for column in columns)
        assert scale is not None
        return Grid(scale, *rest)


class Line(NamedTuple):
    """How codes of a group become weights: scale * (c - zero) + offset.

    Attributes:
        scale: float32 [rows, groups], or [1, 1].
        zero: Zero points, shaped like ``scale``, or one for all (a scalar).
        offset: float32 [rows, groups]; None for 0.
        levels: What stands for a code instead of c - zero, float32 [2^b]; None for c - zero.
            Ascending, unless they are ``whole``. Of vector codes, points [4^b, 2]: see ``pairs``.
        whole: Whether the levels are whole numbers from -128 to 127.
    """

    scale: Tensor
    zero: Tensor
    offset: Tensor | None = None
    levels: Tensor | None = None
    whole: bool = False


def row_chunks(shape: Sequence[int], chunk: int = CHUNK) -> Iterator[slice]:
    """Slices over the rows of a [rows, cols] matrix that hold about ``chunk`` weights each."""
    rows, cols = shape
    step = max(1, chunk // max(1, cols))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def grouped(matrix: Tensor, size: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [rows, groups, size] of a [rows, cols] matrix, with their groups' indices.

    One view, or two when the last group is short: the full groups, then the short one.

    Args:
        matrix: The matrix.
        size: Columns of a group; 0 or less for all.
    """
    rows, cols = matrix.shape
    size = size if size > 0 else cols
    full, rest = divmod(cols, size)
    if full:
        yield matrix[:, : full * size].view(rows, full, size), slice(0, full)
    if rest:
        yield matrix[:, full * size :].unsqueeze(1), slice(full, full + 1)


def salience(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """What the squared error of every weight counts when the scales of its group are fitted.

    Args:
        weight: Groups of weights [..., size].
        importance: What an error really costs, shaped like ``weight``, not negative; None if that
            is unknown.

    Returns:
        Without importance, magnitude plus root mean square of the group. Otherwise the importance,
        relative to its mean over all dimensions but the first; groups of which none is important
        keep the former, at a weight next to nothing.
    """
    own = weight.abs().add_(weight.square().mean(-1, keepdim=True).sqrt_())
    if importance is None:
        return own
    inner = tuple(range(1, weight.dim()))
    mean = importance.mean(inner, keepdim=True)
    relative = importance / torch.where(mean > 0, mean, 1)
    slight = own.mul_(SLIGHT / own.mean(inner, keepdim=True).clamp_(min=1e-30))
    return torch.where(importance.amax(-1, keepdim=True) > 0, relative, slight)


def spread(importance: Tensor | None, weight: Tensor) -> Tensor | None:
    """Importance [cols] or [rows, cols] for every entry of a weight [rows, cols]: a view.

    Raises:
        ValueError: If the shapes do not go together.
    """
    if importance is None:
        return None
    if importance.shape not in (weight.shape, weight.shape[1:]):
        raise ValueError(
            f"The importance {list(importance.shape)} does not go with a weight "
            f"{list(weight.shape)}: give one number for each of its columns or entries."
        )
    return importance.detach().float().expand(weight.shape)


def round_to_codes(weight: Tensor, line: Line, bits: int, size: int, out: Tensor) -> None:
    """Write the nearest codes to ``out``, as float32.

    Args:
        weight: [rows, cols], float32; may be ``out``.
        line: What codes stand for.
        bits: Bits of a code.
        size: Columns of a group.
        out: [rows, cols], float32.
    """
    inverse = torch.where(line.scale == 0, 0, 1 / line.scale)
    for (block, groups), (codes, _) in zip(
        grouped(weight.detach(), size), grouped(out, size), strict=True
    ):
        if line.offset is None:
            torch.mul(block, inverse[:, groups, None], out=codes)
        else:
            torch.sub(block, line.offset[:, groups, None], out=codes)
            codes.mul_(inverse[:, groups, None])
        if line.levels is not None and line.levels.dim() == 2:
            codes.copy_(nearest_points(codes, line.levels, bits))
        elif line.levels is None:
            codes.add_(_zero(line, groups)).round_().clamp_(0, 2**bits - 1)
        elif line.whole:
            codes.copy_(nearest_level(codes, line.levels))
        else:
            codes.copy_(count_borders(codes, line.levels))


def count_borders(values: Tensor, levels: Tensor) -> Tensor:
    """Codes, uint8, of the ascending levels nearest to ``values``; faster than a search."""
    counts = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for border in (levels[1:] + levels[:-1]) / 2:
        counts.add_(values.ge(border).view(torch.uint8))
    return counts


def dequantize(codes: Tensor, line: Line, size: int) -> None:
    """Turn float32 codes [rows, cols] into weights in place, by groups of ``size`` columns.

    Exact but for the addition of a minimum and the products of levels that are no whole numbers:
    codes, scales and their products have few bits.
    """
    for block, groups in grouped(codes, size):
        if line.levels is not None and line.levels.dim() == 2:
            bits = (len(line.levels).bit_length() - 1) // 2
            block.copy_(values_of(block, line.levels, bits)).mul_(line.scale[:, groups, None])
        elif line.levels is None:
            block.sub_(_zero(line, groups)).mul_(line.scale[:, groups, None])
        else:
            block.copy_(line.levels[block.long()]).mul_(line.scale[:, groups, None])
        if line.offset is not None:
            block.add_(line.offset[:, groups, None])


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Codes, float32, of the levels nearest to ``values``; of two equally near, the larger level.

    Levels are whole numbers from -128 to 127, so half-way between two is a multiple of 1/2: a
    table of all halves replaces a search.
    """
    return look_up(values, level_codes(levels).float())


def level_codes(levels: Tensor) -> Tensor:
    """Codes [512] of the levels nearest to -128, -127.5 ... 127.5; see :func:`nearest_level`."""
    ordered, order = levels.sort(stable=True)
    halves = torch.arange(512, device=levels.device) / 2 - 128
    return order[torch.bucketize(halves, (ordered[1:] + ordered[:-1]) / 2, right=True)]


def look_up(values: Tensor, table: Tensor) -> Tensor:
    """What ``table`` [512] has for the multiples of 1/2 at or below ``values``."""
    places = values.clamp(-128, 127.5).add_(128).mul_(2).int()
    return table.index_select(0, places.reshape(-1)).view(values.shape)


def exponent(stored: Tensor) -> Tensor:
    """Powers of two, float32, for the E8M0 exponents of levels in halves: 2^(e - 128)."""
    return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 128)


def _zero(line: Line, groups: slice) -> Tensor:
    return line.zero[:, groups, None] if line.zero.dim() else line.zero

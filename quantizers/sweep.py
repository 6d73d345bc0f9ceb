"""Columns rounded one after the other, each to make up for the errors of those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .format import PER_TENSOR, Format
from .grid import line_of
from .lines import CHUNK, Grid, Line, dequantize


class Lattice(NamedTuple):
    """What codes of rows [rows, cols] stand for: ``scale * (c - zero) + offset``.

    A :class:`.lines.Line` with scales for every row, also where all rows share one.

    Attributes:
        scale: float32 [rows, groups].
        zero: float32 [rows, groups].
        offset: float32 [rows, groups]; None for 0.
        levels: What stands for a code instead of c - zero, float32 [2^b]; None for c - zero. Of
            pairs of columns, points [4^b, 2].
        size: Columns of a group.
        bits: Bits of a code.
    """

    scale: Tensor
    zero: Tensor
    offset: Tensor | None
    levels: Tensor | None
    size: int
    bits: int

    @property
    def pairs(self) -> bool:
        """Whether the codes of two columns together stand for a point."""
        return self.levels is not None and self.levels.dim() == 2

    @staticmethod
    def of(fmt: Format, grid: Grid, rows: int, cols: int) -> Lattice:
        """What the codes of a grid stand for."""
        line = line_of(fmt, grid)
        shape = (rows, line.scale.shape[1])
        scale, zero, offset = (
            None if part is None else part.to(line.scale.device).expand(shape).contiguous()
            for part in (line.scale, line.zero, line.offset)
        )
        assert scale is not None and zero is not None
        size = fmt.group_size if fmt.group_size > 0 else cols
        return Lattice(scale, zero, offset, line.levels, size, fmt.bits)

    @staticmethod
    def empty(fmt: Format, weight: Tensor) -> Lattice:
        """For a weight in an integer format whose scales and zero points are not known yet."""
        (rows, cols), device = weight.shape, weight.device
        scale = torch.zeros(rows, fmt.groups(cols), device=device)
        size = fmt.group_size if fmt.group_size > 0 else cols
        zero = torch.full_like(scale, fmt.zero_point)
        return Lattice(scale, zero, None, None, size, fmt.bits)

    def grid(self, fmt: Format) -> Grid:
        """The grid of an integer format."""
        scale = self.scale[:1, :1] if fmt.group_size == PER_TENSOR else self.scale
        zero = self.zero[: len(scale), : scale.shape[1]].to(torch.uint8)
        return Grid(scale.half(), None if fmt.symmetric else zero)

    def values(self, codes: Tensor) -> Tensor:
        """The weights, float32 [rows, cols], of codes uint8 [rows, cols]."""
        values = codes.float()
        dequantize(values, Line(self.scale, self.zero, self.offset, self.levels), self.size)
        return values


class Cells(NamedTuple):
    """Scale, its inverse, zero point and offset of a group in some rows, each [parts, rows]."""

    scale: Tensor
    inverse: Tensor
    zero: Tensor
    offset: Tensor | None = None

    @staticmethod
    def of(scale: Tensor, zero: Tensor, offset: Tensor | None = None) -> Cells:
        """With the inverse of the scale, 0 of 0."""
        return Cells(scale, torch.where(scale == 0, 0, 1 / scale), zero, offset)


class Levels(NamedTuple):
    """Levels in ascending order, the codes that stand for them, and what lies half-way between."""

    values: Tensor
    codes: Tensor
    borders: Tensor

    @staticmethod
    def of(levels: Tensor | None) -> Levels | None:
        """In order; of two equal levels the one with the lower code first."""
        if levels is None:
            return None
        values, codes = levels.sort(stable=True)
        return Levels(values, codes.to(torch.uint8), (values[1:] + values[:-1]) / 2)


class Sweep:
    """One sweep over the columns of some rows, kept transposed so that columns lie in memory.

    Args:
        weight: [parts, rows, cols], its columns in the order in which they are rounded.
        feedback: R [parts, cols, cols] of these columns, unit upper triangular.
        bits: Bits per code.
        levels: What codes stand for instead of themselves less the zero point.
        points: What those of two columns stand for [4^b, 2].
    """

    def __init__(
        self,
        weight: Tensor,
        feedback: Tensor,
        bits: int,
        levels: Levels | None = None,
        points: Tensor | None = None,
    ) -> None:
        self.weight, self.points = weight.transpose(1, 2).contiguous(), points
        self.feedback, self.most, self.levels = feedback, 2**bits - 1, levels
        self.error = torch.zeros_like(self.weight)
        self.value = torch.empty_like(self.weight)
        self.code = torch.empty_like(self.weight, dtype=torch.uint8)

    def target(self, start: int, end: int) -> Tensor:
        """Columns [parts, end - start, rows] with the errors before ``start`` made up for."""
        weight = self.weight[:, start:end]
        back = self.feedback[:, :start, start:end].transpose(1, 2)
        return torch.baddbmm(weight, back, self.error[:, :start])

    def expected(self, target: Tensor, start: int) -> Tensor:
        """What the columns of ``target`` would best be if they were not rounded, same shape.

        Targets count on no error in the columns since ``start``; here each of these makes up for
        the errors before ``start`` as well. These are the updated weights of GPTQ.
        """
        end = start + target.shape[1]
        weight = self.weight[:, start:end]
        back = self.feedback[:, start:end, start:end].transpose(1, 2)
        made_up: Tensor = torch.linalg.solve_triangular(
            back, target - weight, upper=False, unitriangular=True
        )
        return weight + made_up

    def round(self, target: Tensor, start: int, cells: Cells | Callable[[int], Cells]) -> None:
        """Round the columns from ``start`` on; ``cells`` are those of all, or give a column's."""
        end = start + target.shape[1]
        for column in range(start, end):
            value, code = self._nearest(
                target[:, column - start], cells(column) if callable(cells) else cells
            )
            self.code[:, column] = code
            self.value[:, column] = value
            error = torch.sub(self.weight[:, column], value, out=self.error[:, column])
            if column + 1 < end:
                back = self.feedback[:, column, column + 1 : end, None]
                target[:, column + 1 - start :].addcmul_(back, error[:, None])

    def round_pairs(
        self, target: Tensor, start: int, cells: Callable[[int], Cells], pivots: Tensor
    ) -> None:
        """Round columns from ``start`` on two by two, codes of a point each.

        Args:
            target: [parts, columns, rows].
            start: The first of them, even.
            cells: Those of a column.
            pivots: D [parts, columns].
        """
        assert self.points is not None
        end, cols = start + target.shape[1], self.weight.shape[1]
        bits = self.most.bit_length()
        for column in range(start, end, 2):
            alone, scale = column + 1 == cols, cells(column).scale
            points = self.points[: self.most + 1] if alone else self.points
            at = column - start
            values = scale[..., None] * points[:, 0], scale[..., None] * points[:, 1]
            error = self.weight[:, column, :, None] - values[0]
            costs = (target[:, at, :, None] - values[0]).square_() * pivots[:, at, None, None]
            if not alone:
                onward = self.feedback[:, column, column + 1, None, None]
                off = target[:, at + 1, :, None] + onward * error - values[1]
                costs += off.square_() * pivots[:, at + 1, None, None]
            best = costs.argmin(-1, keepdim=True)
            codes = best[..., 0] & self.most, best[..., 0] >> bits
            for i in range(1 if alone else 2):
                self.code[:, column + i] = codes[i].to(torch.uint8)
                value = values[i].expand_as(costs).gather(-1, best)[..., 0]
                self.value[:, column + i] = value
                self.error[:, column + i] = self.weight[:, column + i] - value
                back = self.feedback[:, column + i, column + 2 : end, None]
                target[:, at + 2 :].addcmul_(back, self.error[:, column + i, None])

    def _nearest(self, target: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """The nearest values and their codes, [parts, rows]."""
        if cells.offset is not None:
            target = target - cells.offset
        if self.levels is None:
            code = torch.addcmul(cells.zero, target, cells.inverse)
            code = code.round_().clamp_(0, self.most)
            value = (code - cells.zero).mul_(cells.scale)
        else:
            rank = torch.bucketize(target * cells.inverse, self.levels.borders, right=True)
            code = self.levels.codes[rank]
            value = self.levels.values[rank].mul_(cells.scale)
        return value if cells.offset is None else value.add_(cells.offset), code


def chunks(parts: int, rows: int, cols: int) -> Iterator[tuple[slice, slice]]:
    """Parts, and rows of them all together, of [parts, rows, cols]: about ``CHUNK`` weights."""
    step = max(1, CHUNK // max(1, cols))
    if rows >= step:
        for part in range(parts):
            for start in range(part * rows, (part + 1) * rows, step):
                yield slice(part, part + 1), slice(start, min(start + step, (part + 1) * rows))
        return
    some = step // max(1, rows)
    for first in range(0, parts, some):
        last = min(first + some, parts)
        yield slice(first, last), slice(first * rows, last * rows)

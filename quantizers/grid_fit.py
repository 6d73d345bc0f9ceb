"""Fit the scales of a group, and its zero point: the least weighted squared error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .format import PER_TENSOR, Format
from .group_fit import Candidates
from .lines import Grid, grouped, row_chunks, salience, spread
from .pairs import look_up_points, point_table

# Where to clip, relative to the largest weights of a group: with few levels, far inside.
LEAST_RATIO = {1: 0.2, 2: 0.5, 3: 0.8, 4: 0.88, 5: 0.95, 6: 0.975, 7: 0.985, 8: 0.994}
RATIOS = {bits: torch.linspace(1, least, 4).tolist() for bits, least in LEAST_RATIO.items()}
FURTHER = (0.8, 0.6, 0.4)  # times the least: where large weights may be of no account
CELLS = 1 << 12  # in which a level is looked up while scales are compared


def fit_integers(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Grid:
    """Fit the scales and zero points of an integer format to ``weight`` [rows, cols].

    See ``methods/rtn.py`` for what they minimize, and ``Family.fit`` for ``importance``.
    """
    return _fit(weight, fmt, importance, _Integers)


def fit_levels(weight: Tensor, fmt: Format, importance: Tensor) -> Grid:
    """Fit the scales of a format whose codes stand for ascending levels, to match importance."""
    return _fit(weight, fmt, importance, _Levels)


def fit_normal_levels(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Grid:
    """Fit the scales of levels for a standard normal variable, which need not reach all weights."""
    return _fit(weight, fmt, importance, _NormalLevels)


def fit_points(
    weight: Tensor,
    fmt: Format,
    importance: Tensor | None,
    points: Sequence[tuple[float, float]],
) -> Grid:
    """Fit the scales of a format whose codes of two columns stand for a point [4^b]."""
    table = torch.tensor(points, dtype=torch.float32, device=weight.device)

    class Fit(_Points):
        points, cells = table, point_table(table)

    return _fit(weight, fmt, importance, Fit)


def clip_ratios(bits: int, weighted: bool) -> list[float]:
    """Where to clip, relative to the largest weights of a group: further where importance says."""
    return RATIOS[bits] + [LEAST_RATIO[bits] * share for share in FURTHER if weighted]


def _fit(weight: Tensor, fmt: Format, importance: Tensor | None, kind: type[_Integers]) -> Grid:
    weight, importance = weight.detach(), spread(importance, weight)
    if fmt.group_size == PER_TENSOR:
        weight = weight.reshape(1, -1)
        importance = None if importance is None else importance.reshape(1, -1)
    shape = (weight.shape[0], fmt.groups(weight.shape[1]))
    scale = torch.empty(shape, dtype=torch.float16, device=weight.device)
    zero = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(weight.shape):
        counts = weight if importance is None else importance
        for (block, groups), (count, _) in zip(
            grouped(weight[rows], fmt.group_size),
            grouped(counts[rows], fmt.group_size),
            strict=True,
        ):
            flat = block.reshape(-1, block.shape[2]).float()
            fit = kind(flat, fmt, None if importance is None else count.reshape(flat.shape))
            scale[rows, groups] = fit.scale.view(block.shape[:2]).half()
            zero[rows, groups] = fit.zero.view(block.shape[:2]).to(torch.uint8)
    return Grid(scale, None if fmt.symmetric else zero)


class _Integers(Candidates):
    """The best scale and zero point of every group of ``weight`` [groups, size]."""

    def __init__(self, weight: Tensor, fmt: Format, importance: Tensor | None) -> None:
        counts = salience(weight, importance)
        super().__init__(weight, counts, 2**fmt.bits - 1, fmt.zero_point)
        for scale, zero in self.unclipped(fmt.zero_point if fmt.symmetric else None):
            for ratio in clip_ratios(fmt.bits, importance is not None):
                self.offer(scale * ratio, zero)
        self.refine(fmt.symmetric)


class _Levels(_Integers):
    """The best scale of every group where levels take the place of codes less a zero point."""

    def __init__(self, weight: Tensor, fmt: Format, importance: Tensor | None) -> None:
        assert fmt.levels is not None
        self.low, self.high = fmt.levels[0], fmt.levels[-1]
        cells = (torch.arange(CELLS, device=weight.device) + 0.5) * self._cell + self.low
        levels = torch.tensor(fmt.levels, device=weight.device)
        self._nearest = levels[torch.bucketize(cells, (levels[1:] + levels[:-1]) / 2)]
        super().__init__(weight, fmt, importance)

    @property
    def _cell(self) -> float:
        return (self.high - self.low) / CELLS

    def unclipped(self, middle: float | None) -> list[tuple[Tensor, Tensor]]:
        """Scales whose levels reach the largest weights on both sides; they are positive."""
        self.zero.zero_()
        low, high = self.weight.amin(1) / self.low, self.weight.amax(1) / self.high
        return [(torch.maximum(low, high), self.zero)]

    def _round(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest levels, but for weights that lie half-way between two."""
        inverse = torch.where(scale == 0, 0, 1 / scale)
        torch.mul(self.weight, inverse[:, None], out=self._position)
        cells = torch.sub(self._position, self.low, out=self._codes).div_(self._cell)
        cells = cells.clamp_(0, CELLS - 1).int().view(-1)
        torch.index_select(self._nearest, 0, cells, out=self._codes.view(-1))
        return self._position.sub_(self._codes)


class _NormalLevels(_Levels):
    """Likewise where the scale is about the group's root mean square."""

    def unclipped(self, middle: float | None) -> list[tuple[Tensor, Tensor]]:
        """Also scales around the weighted root mean square, among which the ratios then search."""
        return [*super().unclipped(middle), (_about_root(self), self.zero)]


class _Points(_Integers):
    """The best scale of every group where codes of two columns stand for a point."""

    points: ClassVar[Tensor]
    cells: ClassVar[Tensor]

    def unclipped(self, middle: float | None) -> list[tuple[Tensor, Tensor]]:
        """Scales around the root mean square, and those that reach the largest weights."""
        self.zero.zero_()
        reach = self.weight.abs().amax(1) / float(self.points.abs().amax())
        return [(reach, self.zero), (_about_root(self), self.zero)]

    def _round(self, scale: Tensor, zero: Tensor) -> Tensor:
        inverse = torch.where(scale == 0, 0, 1 / scale)
        torch.mul(self.weight, inverse[:, None], out=self._position)
        self._codes.copy_(look_up_points(self._position, self.points, self.cells))
        return self._position.sub_(self._codes)


def _about_root(fit: Candidates) -> Tensor:
    """What clipping ratios make scales around the weighted root mean square of groups of."""
    total = fit.salience.sum(1).clamp_(min=1e-30)
    mean = (fit.weight.square() * fit.salience).sum(1) / total
    return mean.sqrt_() * (2 / (1 + LEAST_RATIO[fit.max_code.bit_length()]))

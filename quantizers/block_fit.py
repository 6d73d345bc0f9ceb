"""Fit the scales of block formats: of every group first, then the block's scales that hold them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .blocks import Layout, layouts
from .format import Format
from .grid_fit import clip_ratios
from .lines import CHUNK, Grid, exponent, level_codes, look_up, row_chunks, salience, spread

REFITS = 2  # least-squares scales of the codes found
_LEAST = 1e-30


def fit_blocks(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Grid:
    """Fit a grid of a block format to ``weight`` [rows, cols].

    Args:
        weight: The weight, finite.
        fmt: A block format.
        importance: See ``Family.fit``.

    Returns:
        The grid; the scales and minimums it holds are those that minimize the weighted squared
        error, after they were rounded to what the block stores.
    """
    layout, importance = layouts()[fmt.name], spread(importance, weight)
    parts: list[Grid] = []
    for some in row_chunks(weight.shape, CHUNK // 4):  # there are several temporaries
        chunk = weight[some].detach()
        count = None if importance is None else _blocks(importance[some], fmt)
        fit = _Fit(_blocks(chunk, fmt), fmt, layout, count)
        grid = fit.exponents() if "e" in layout.fields else fit.halves()
        if layout.scale_range is not None:
            grid = fit.nested()
        rest = (None if part is None else part.view(len(chunk), -1) for part in grid[1:])
        parts.append(Grid(grid.scale.view(len(chunk), -1), *rest))
    joined = Grid.joined(parts)
    assert len(joined.scale) == len(weight)
    return joined


def _blocks(matrix: Tensor, fmt: Format) -> Tensor:
    """The groups [blocks, groups, size] of the blocks of [rows, cols], padded with zeros."""
    padded = pad(matrix.float(), (0, -matrix.shape[1] % fmt.block_size))
    return padded.reshape(-1, fmt.block_size // fmt.group_size, fmt.group_size)


class _Terms(NamedTuple):
    """Weighted sums over a group: of 1, its levels l, l^2, its weights w, l w; each [B, P]."""

    one: Tensor
    l: Tensor  # noqa: E741
    ll: Tensor
    w: Tensor
    lw: Tensor


class _Fit:
    """The best scale and offset so far of every group of ``weight`` [blocks, groups, size].

    A weight stands for ``scale * level + offset``.  Errors are squares weighted by ``salience``.
    """

    def __init__(
        self, weight: Tensor, fmt: Format, layout: Layout, importance: Tensor | None
    ) -> None:
        self.weight, self.layout, self.max_code = weight, layout, 2**fmt.bits - 1
        self.salience = salience(weight, importance)
        self.affine = "m" in layout.fields
        self.nonpositive = self.affine and layout.scale_range is not None
        self.levels = None
        if layout.levels is not None:
            levels = torch.tensor(layout.levels, dtype=torch.float32, device=weight.device)
            self.levels = levels[level_codes(levels)]
        self.error = torch.full_like(weight[..., 0], torch.inf)
        self.scale = torch.zeros_like(self.error)
        self.offset = torch.zeros_like(self.error)
        for scale, offset in self._unclipped():
            for ratio in clip_ratios(fmt.bits, importance is not None):
                self._offer(scale * ratio, offset * ratio)

    def halves(self) -> Grid:
        """Scales (and minimums) as float16, one each a group."""
        if self.layout.scale_range is None:
            self.error.fill_(torch.inf)
            start = self.scale, self.offset
            self._offer(*self._rounded(*start))
            for _ in range(REFITS):
                self._offer(*self._rounded(*self._least_squares()))
        else:
            for _ in range(REFITS):
                self._offer(*self._least_squares())
        return Grid(self.scale.half(), self.offset.half() if self.affine else None)

    def exponents(self) -> Grid:
        """Scales as powers of two."""
        start = self.scale.abs().clamp_(min=2.0**-120).log2_().floor_() + 128
        best = start.clamp(2, 254)
        self.error.fill_(torch.inf)
        for step in (0, 1, -1):
            stored = (start + step).clamp_(2, 254)
            before = self.error
            self._offer(exponent(stored.to(torch.uint8)), self.offset)
            best = torch.where(self.error < before, stored, best)
        return Grid(best.to(torch.uint8), None)

    def nested(self) -> Grid:
        """Group scales as multiples of a float16 scale of the block."""
        low, high = self.layout.scale_range or (0, 0)
        reach = self.scale.gather(1, self.scale.abs().argmax(1, keepdim=True))
        d = (reach / (high if low == 0 else low)).half().float()
        m = (-self.offset).amax(1, keepdim=True).div_(high).half().float()
        scales = _divide(self.scale, d).round_().clamp_(low, high)
        mins = _divide(-self.offset, m).round_().clamp_(0, high)
        scales, mins, error = self._polish(d, m, scales, mins)
        for _ in range(REFITS):
            new_d, new_m = self._block_least_squares(d, m, scales, mins)
            new_scales, new_mins, new_error = self._polish(new_d, new_m, scales, mins)
            better = new_error.sum(1, keepdim=True) < error.sum(1, keepdim=True)
            d, m = torch.where(better, new_d, d), torch.where(better, new_m, m)
            scales = torch.where(better, new_scales, scales)
            mins = torch.where(better, new_mins, mins)
            error = torch.where(better, new_error, error)
        stored = (scales + self.layout.bias).to(torch.uint8)
        if not self.affine:
            return Grid(d.half(), None, stored)
        return Grid(d.half(), m.half(), stored, mins.to(torch.uint8))

    def _polish(
        self, d: Tensor, m: Tensor, scales: Tensor, mins: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Try the neighbours of every group's scale and minimum; the best and their errors."""
        low, high = self.layout.scale_range or (0, 0)
        error = self._errors(d * scales, -m * mins)
        for step in (1, -1):
            tried = (scales + step).clamp_(low, high)
            new = self._errors(d * tried, -m * mins)
            scales, error = torch.where(new < error, tried, scales), torch.minimum(new, error)
        for step in (1, -1) if self.affine else ():
            tried = (mins + step).clamp_(0, high)
            new = self._errors(d * scales, -m * tried)
            mins, error = torch.where(new < error, tried, mins), torch.minimum(new, error)
        return scales, mins, error

    def _offer(self, scale: Tensor, offset: Tensor) -> None:
        error = self._errors(scale, offset)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.offset = torch.where(better, offset, self.offset)

    def _errors(self, scale: Tensor, offset: Tensor) -> Tensor:
        levels = self._nearest(scale, offset).mul_(scale[..., None])
        levels.add_(offset[..., None]).sub_(self.weight)
        return levels.square_().mul_(self.salience).sum(2)

    def _nearest(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The levels, as they are multiplied by the scale, nearest to the weights."""
        inverse = torch.where(scale == 0, 0, 1 / scale)[..., None]
        position = torch.sub(self.weight, offset[..., None]) if self.affine else self.weight
        position = position * inverse
        if self.levels is not None:
            return look_up(position, self.levels)
        zero = self.layout.zero
        return position.round_().clamp_(-zero, self.max_code - zero)

    def _terms(self, scale: Tensor, offset: Tensor) -> _Terms:
        levels = self._nearest(scale, offset)
        weighted = levels * self.salience
        return _Terms(
            self.salience.sum(2),
            weighted.sum(2),
            (weighted * levels).sum(2),
            (self.salience * self.weight).sum(2),
            (weighted * self.weight).sum(2),
        )

    def _least_squares(self) -> tuple[Tensor, Tensor]:
        """The best scale and offset of every group for its present levels."""
        t = self._terms(self.scale, self.offset)
        alone = _divide(t.lw, t.ll)
        if not self.affine:
            return torch.where(t.ll > 0, alone, self.scale), self.offset
        det = t.one * t.ll - t.l * t.l
        scale = _divide(t.one * t.lw - t.l * t.w, det)
        offset = _divide(t.w - scale * t.l, t.one)
        bad = (det <= 0) | (scale <= 0)
        if self.nonpositive:
            bad |= offset > 0
        usable = alone.clamp_min(0)
        return torch.where(bad, usable, scale), torch.where(bad, 0, offset)

    def _block_least_squares(
        self, d: Tensor, m: Tensor, scales: Tensor, mins: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best scales of every block, as float16, for its present levels and group scales."""
        t = self._terms(d * scales, -m * mins)
        ll = (t.ll * scales * scales).sum(1, keepdim=True)
        lw = (t.lw * scales).sum(1, keepdim=True)
        if not self.affine:
            return torch.where(ll > 0, _divide(lw, ll), d).half().float(), m
        mm = (t.one * mins * mins).sum(1, keepdim=True)
        lm = -(t.l * scales * mins).sum(1, keepdim=True)
        mw = -(t.w * mins).sum(1, keepdim=True)
        det = ll * mm - lm * lm
        new_d = _divide(mm * lw - lm * mw, det)
        new_m = _divide(ll * mw - lm * lw, det)
        good = (det > 0) & (new_d > 0) & (new_m >= 0)
        return torch.where(good, new_d, d).half().float(), torch.where(
            good, new_m, m
        ).half().float()

    @staticmethod
    def _rounded(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        return scale.half().float(), offset.half().float()

    def _unclipped(self) -> list[tuple[Tensor, Tensor]]:
        """Scales and offsets of grids that reach the largest weights."""
        low, high = self.weight.amin(2), self.weight.amax(2)
        if self.affine:
            if self.nonpositive:
                low.clamp_(max=0)
                high.clamp_(min=0)
            return [((high - low) / self.max_code, low)]
        largest = torch.where(high > -low, high, low)
        ends: tuple[float, ...] = -self.layout.zero, self.max_code - self.layout.zero
        if self.layout.levels is not None:
            ends = min(self.layout.levels), max(self.layout.levels)
        return [(largest / end, torch.zeros_like(largest)) for end in ends]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, or 0 where b is."""
    return torch.where(b.abs() > _LEAST, a / b, 0)

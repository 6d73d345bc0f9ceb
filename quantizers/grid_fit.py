"""Fit the grids of integer formats: the least weighted squared error per group."""

from __future__ import annotations

import torch
from torch import Tensor

from .format import PER_TENSOR, Format
from .lines import Grid, grouped, row_chunks

# Where to clip, relative to the largest weights of a group: with few levels, far inside.
LEAST_RATIO = {1: 0.2, 2: 0.5, 3: 0.8, 4: 0.88, 5: 0.95, 6: 0.975, 7: 0.985, 8: 0.994}
RATIOS = {bits: torch.linspace(1, least, 4).tolist() for bits, least in LEAST_RATIO.items()}
REFINEMENTS = 2


def fit_integers(weight: Tensor, fmt: Format) -> Grid:
    """Fit the scales and zero points of an integer format to ``weight`` [rows, cols].

    See ``methods/rtn.py`` for what they minimize.
    """
    weight = weight.detach()
    if fmt.group_size == PER_TENSOR:
        weight = weight.reshape(1, -1)
    shape = (weight.shape[0], fmt.groups(weight.shape[1]))
    scale = torch.empty(shape, dtype=torch.float16, device=weight.device)
    zero = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(weight.shape):
        for block, groups in grouped(weight[rows], fmt.group_size):
            fit = _fit(block.reshape(-1, block.shape[2]).float(), fmt)
            scale[rows, groups] = fit.scale.view(block.shape[:2]).half()
            zero[rows, groups] = fit.zero.view(block.shape[:2]).to(torch.uint8)
    return Grid(scale, None if fmt.symmetric else zero)


class _Fit:
    """The best scale and zero point so far of every group of ``weight`` [groups, size]."""

    def __init__(self, weight: Tensor, fmt: Format) -> None:
        self.weight = weight
        self.salience = weight.abs().add_(weight.square().mean(1, keepdim=True).sqrt_())
        self.max_code = 2**fmt.bits - 1
        self.error = torch.full_like(weight[:, 0], torch.inf)
        self.scale = torch.zeros_like(self.error)
        self.zero = torch.full_like(self.error, fmt.zero_point)
        self._position = torch.empty_like(weight)
        self._codes = torch.empty_like(weight)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take the scale and zero point, both [groups], wherever they lower the error."""
        scale = scale.half().float()
        error = self._round(scale, zero)
        error = error.mul_(error).mul_(self.salience).sum(1).mul_(scale).mul_(scale)
        better = (error < self.error) & (scale != 0)  # float16 may round a scale to 0
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def shift_zero(self) -> None:
        """Offer the two neighbouring zero points."""
        scale, zero = self.scale, self.zero
        self.offer(scale, (zero + 1).clamp_(max=self.max_code))
        self.offer(scale, (zero - 1).clamp_(min=0))

    def refit_scale(self) -> None:
        """Offer the scale with the least error for the present codes."""
        self._round(self.scale, self.zero)
        steps = self._codes.sub_(self.zero[:, None])
        salient = torch.mul(steps, self.salience, out=self._position)
        norm = steps.mul_(salient).sum(1)
        scale = salient.mul_(self.weight).sum(1).div_(norm)
        self.offer(torch.where(norm > 0, scale, self.scale), self.zero)

    def _round(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Set the codes; return the rounding errors [groups, size] in units of the scale."""
        inverse = torch.where(scale == 0, 0, 1 / scale)
        torch.mul(self.weight, inverse[:, None], out=self._position).add_(zero[:, None])
        torch.round(self._position, out=self._codes).clamp_(0, self.max_code)
        return self._position.sub_(self._codes)


def _fit(weight: Tensor, fmt: Format) -> _Fit:
    """Fit scales and zero points to ``weight`` [groups, size]."""
    fit = _Fit(weight, fmt)
    for scale, zero in _unclipped(weight, fmt):
        for ratio in RATIOS[fmt.bits]:
            fit.offer(scale * ratio, zero)
    for _ in range(REFINEMENTS):
        if not fmt.symmetric:
            fit.shift_zero()
        fit.refit_scale()
    return fit


def _unclipped(weight: Tensor, fmt: Format) -> list[tuple[Tensor, Tensor]]:
    """Scales and zero points [groups] whose grids reach the largest weights."""
    max_code = 2**fmt.bits - 1
    low = weight.amin(1).clamp_(max=0)
    high = weight.amax(1).clamp_(min=0)
    if fmt.symmetric:  # the grid reaches further on one side; the sign of the scale says which
        zero = torch.full_like(low, fmt.zero_point)
        largest = torch.where(high > -low, high, low)
        starts = [(largest / -fmt.zero_point, zero), (largest / (max_code - fmt.zero_point), zero)]
    else:
        width = high - low
        zero = torch.where(width == 0, 0, -low / width * max_code).round_()
        starts = [(width / max_code, zero)]
    return starts

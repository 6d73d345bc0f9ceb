"""Fit the grid of one group of columns to what its errors cost, just before it is rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REFINEMENTS = 2


def fit_group(
    weight: Tensor, importance: Tensor, ratios: Sequence[float], most: int, middle: float | None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [rows] that minimize ``sum_j importance_j (w_j - rendered_j)^2``.

    All clipping ratios are tried with three neighbouring zero points each, then zero points and
    the least-squares scales of the codes found.  The same as ``Fitting`` of ``rounding.cpp``.

    Args:
        weight: The group in every row, float32 [rows, size].
        importance: What a squared error in a column costs [rows, size].
        ratios: Where to clip, relative to the largest weights.
        most: The largest code.
        middle: The zero point of a symmetric format; None for one that is fitted, too.
    """
    fit = _Fit(weight, importance, most, middle or 0.0)
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    if middle is not None:  # the grid reaches further on one side; the sign of the scale says which
        largest, zero = torch.where(high > -low, high, low), fit.zero
        for start in (largest / -middle, largest / (most - middle)):
            for ratio in ratios:
                fit.offer(start * ratio, zero)
    else:
        width = high - low
        zero = torch.where(width == 0, 0, -low / width * most).round_()
        for ratio in ratios:
            for near in (zero, *fit.neighbours(zero)):
                fit.offer(width / most * ratio, near)
    for _ in range(REFINEMENTS):
        if middle is None:
            scale, zero = fit.scale, fit.zero
            for near in fit.neighbours(zero):
                fit.offer(scale, near)
        fit.refit()
    return fit.scale, fit.zero


class _Fit:
    """The best scale and zero point so far of every row."""

    def __init__(self, weight: Tensor, importance: Tensor, most: int, middle: float) -> None:
        self.weight, self.importance, self.most = weight, importance, most
        self.error = torch.full_like(weight[:, 0], torch.inf)
        self.scale = torch.zeros_like(self.error)
        self.zero = torch.full_like(self.error, middle)

    def neighbours(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        return (zero + 1).clamp_(max=self.most), (zero - 1).clamp_(min=0)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take scale and zero point wherever they lower the error."""
        scale = scale.clamp(-65504, 65504).half().float()
        position, code = self._rounded(scale, zero)
        error = position.sub_(code).square_().mul_(self.importance).sum(1).mul_(scale).mul_(scale)
        better = (error < self.error) & (scale != 0)  # float16 may round a scale to 0
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def refit(self) -> None:
        """Offer the scale with the least error for the present codes."""
        zero = self.zero
        step = self._rounded(self.scale, zero)[1].sub_(zero[:, None])
        weighted = step * self.importance
        norm = (weighted * step).sum(1)
        scale = (weighted * self.weight).sum(1) / norm
        self.offer(torch.where(norm > 0, scale, self.scale), zero)

    def _rounded(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in units of the scale, plus the zero point; and the codes nearest to them."""
        inverse = torch.where(scale == 0, 0, 1 / scale)
        position = self.weight * inverse[:, None] + zero[:, None]
        return position, position.round().clamp_(0, self.most)

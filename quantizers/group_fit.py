"""The best scale and zero point of groups: candidates are offered, and the least error counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .format import MAX_FLOAT16

REFINEMENTS = 2


class Candidates:
    """The best scale and zero point so far of every group of ``weight`` [groups, size].

    Args:
        weight: The groups, float32.
        salience: What the squared error of every weight counts, shaped like ``weight``.
        max_code: The largest code.
        zero: The zero point of a group that no candidate suits.
    """

    def __init__(self, weight: Tensor, salience: Tensor, max_code: int, zero: float) -> None:
        self.weight, self.salience, self.max_code = weight, salience, max_code
        self.error = torch.full_like(weight[:, 0], torch.inf)
        self.scale = torch.zeros_like(self.error)
        self.zero = torch.full_like(self.error, zero)
        self._position = torch.empty_like(weight)
        self._codes = torch.empty_like(weight)

    def unclipped(self, middle: float | None) -> list[tuple[Tensor, Tensor]]:
        """Scales and zero points [groups] whose grids reach the largest weights.

        ``middle`` is the zero point of a symmetric format, None where it is fitted, too.
        """
        low = self.weight.amin(1).clamp_(max=0)
        high = self.weight.amax(1).clamp_(min=0)
        if middle is not None:  # it reaches further on one side; the sign of the scale says which
            largest = torch.where(high > -low, high, low)
            return [(largest / end, self.zero) for end in (-middle, self.max_code - middle)]
        width = high - low
        zero = torch.where(width == 0, 0, -low / width * self.max_code).round_()
        return [(width / self.max_code, zero)]

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take the scale and zero point, both [groups], wherever they lower the error."""
        scale = scale.half().float()
        error = self._round(scale, zero)
        error = error.mul_(error).mul_(self.salience).sum(1).mul_(scale).mul_(scale)
        better = (error < self.error) & (scale != 0)  # float16 may round a scale to 0
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def neighbours(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The two neighbouring zero points."""
        return (zero + 1).clamp_(max=self.max_code), (zero - 1).clamp_(min=0)

    def refine(self, symmetric: bool) -> None:
        """Offer neighbouring zero points, and the scales with the least error for the codes."""
        for _ in range(REFINEMENTS):
            if not symmetric:
                scale = self.scale
                for near in self.neighbours(self.zero):
                    self.offer(scale, near)
            self._refit_scale()

    def _refit_scale(self) -> None:
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


def fit_group(
    weight: Tensor, importance: Tensor, ratios: Sequence[float], most: int, middle: float | None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [rows] that minimize ``sum_j importance_j (w_j - rendered_j)^2``.

    For one group of columns, just before it is rounded.  All clipping ratios are tried with three
    neighbouring zero points each, then zero points and the least-squares scales of the codes found.
    The same as ``Fitting`` of ``rounding.cpp``.

    Args:
        weight: The group in every row, float32 [rows, size].
        importance: What a squared error in a column costs [rows, size].
        ratios: Where to clip, relative to the largest weights.
        most: The largest code.
        middle: The zero point of a symmetric format; None for one that is fitted, too.
    """
    fit = _WithinFloat16(weight, importance, most, middle or 0.0)
    for scale, zero in fit.unclipped(middle):
        for ratio in ratios:
            for near in (zero,) if middle is not None else (zero, *fit.neighbours(zero)):
                fit.offer(scale * ratio, near)
    fit.refine(symmetric=middle is not None)
    return fit.scale, fit.zero


class _WithinFloat16(Candidates):
    """Candidates of weights that feedback may have made larger than any that was checked."""

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """See :class:`Candidates`; larger scales count as the largest."""
        super().offer(scale.clamp(-MAX_FLOAT16, MAX_FLOAT16), zero)

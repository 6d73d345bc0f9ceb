"""Quadratics of rounding errors, factored so that columns can be rounded one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

ATTEMPTS = 8  # each with ten times the damping, the first two with the same


class Factors(NamedTuple):
    """A damped matrix H = R D R^T, of as many parts as there are blocks of rows.

    With errors E = W - Q, ``tr(E H E^T) = sum_j D_j |E_j + sum_{i<j} E_i R_ij|^2``: column j is
    best rounded to the nearest of ``W_j + sum_{i<j} E_i R_ij``.

    Attributes:
        feedback: R [parts, cols, cols], unit upper triangular.
        pivots: D [parts, cols].
        damping: What was added to the diagonal of H [parts, cols].
    """

    feedback: Tensor
    pivots: Tensor
    damping: Tensor


def factor(matrix: Tensor, damping: float, dead: float | None = None) -> Factors:
    """Factor H [parts, cols, cols] or [cols, cols], damped until its factor exists.

    Reversing rows and columns turns the lower Cholesky factor of the reversed H into an upper
    one; nothing is inverted.

    Args:
        matrix: H, symmetric and positive semidefinite but for rounding, float32.
        damping: What is added to its diagonal, as a multiple of the diagonal's mean.
        dead: What is added instead where the diagonal is 0, likewise; None for the same.

    Raises:
        ValueError: If H has NaN or Inf, or no factor even with 10^6 times the damping.
    """
    matrix = matrix.reshape(-1, *matrix.shape[-2:])
    if not matrix.isfinite().all():
        raise ValueError(f"What errors of a weight cost, {list(matrix.shape)}, has NaN or Inf.")
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    idle = diagonal == 0  # no input: any value leaves the other columns alone
    live = (~idle).sum(-1).clamp_(min=1)
    mean = diagonal.sum(-1) / live
    mean = torch.where(mean > 0, mean, 1)
    added = damping * mean
    for attempt in range(ATTEMPTS):
        damped = matrix.double() if attempt else matrix.clone()
        more = added[:, None].expand_as(diagonal)
        if dead is not None:
            more = torch.where(idle, dead * mean[:, None], more)
        damped.diagonal(dim1=-2, dim2=-1).add_(more)
        damped = damped.flip(-2, -1)  # large: no name for what is not needed any more
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed.any() and lower.isfinite().all():
            upper: Tensor = lower.flip(-2, -1)
            del lower
            roots = upper.diagonal(dim1=-2, dim2=-1).clone()
            feedback = upper.div_(roots[:, None]).to(matrix.dtype)
            return Factors(feedback, roots.square().to(matrix.dtype), more)
        if attempt:
            added = torch.where(failed > 0, 10 * added, added)
    raise ValueError(
        f"What errors of a weight cost, {list(matrix.shape)}, has no Cholesky factor, "
        f"even with {float((added / mean).max()) / 10:g} of their mean diagonal added. Calibrate "
        "on more data."
    )


class Quadratic(NamedTuple):
    """What errors E of rows cost, ``tr(E H E^T)``, ready for rounding columns in a chosen order.

    Attributes:
        matrix: H [parts, cols, cols], damped.
        order: Columns in the order in which they are rounded, int64 [parts, cols].
        back: R^T of H in that order [parts, cols, cols], unit lower triangular.
        pivots: D of H in that order [parts, cols].
    """

    matrix: Tensor
    order: Tensor
    back: Tensor
    pivots: Tensor

    @staticmethod
    def of(matrix: Tensor, damping: float, size: int, together: int = 1) -> Quadratic:
        """Of H [parts, cols, cols] or [cols, cols], for grids of ``size`` columns a group.

        Columns with large diagonal entries are rounded while there are many left to make up for
        them.  Those of a group stay together, so that its grid can be fitted when it is reached and
        nothing has to be stored of the order; a short last group stays the last.  So do columns
        that are rounded ``together`` with their neighbours.

        Raises:
            ValueError: As :func:`factor`.
        """
        matrix = matrix.reshape(-1, *matrix.shape[-2:])
        parts, cols = matrix.shape[:2]
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        order = _by_size(diagonal, together)
        full = cols // size
        sums = diagonal[:, : full * size].reshape(parts, full, size).sum(-1)
        turn = sums.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        turn = pad(turn, (0, 1), value=full)  # of every group
        order = order.gather(1, turn.gather(1, order // size).argsort(dim=-1, stable=True))
        in_order = matrix.gather(1, order[:, :, None].expand(-1, -1, cols))
        in_order = in_order.gather(2, order[:, None, :].expand(-1, cols, -1))
        factors = factor(in_order, damping)
        del in_order
        matrix = matrix.clone()
        added = torch.empty_like(diagonal).scatter_(1, order, factors.damping)
        matrix.diagonal(dim1=-2, dim2=-1).add_(added)
        return Quadratic(matrix, order, factors.feedback.mT.contiguous(), factors.pivots)

    def of_parts(self, some: slice) -> Quadratic:
        """That of some blocks of rows."""
        return Quadratic(*(part[some] for part in self))


def _by_size(diagonal: Tensor, together: int) -> Tensor:
    """Columns [parts, cols] by descending sums of ``together`` neighbours; a short rest is last."""
    parts, cols = diagonal.shape
    whole = cols // together * together
    sums = diagonal[:, :whole].reshape(parts, -1, together).sum(-1)
    first = sums.argsort(dim=-1, descending=True, stable=True)[..., None] * together
    order = (first + torch.arange(together, device=diagonal.device)).reshape(parts, -1)
    rest = torch.arange(whole, cols, device=diagonal.device).expand(parts, -1)
    return torch.cat([order, rest], 1)

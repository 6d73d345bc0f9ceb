"""Weights that make up for inputs that are not what they were."""

from __future__ import annotations

import torch
from torch import Tensor

from .feedback import factor

DAMPING = 0.07  # of the mean of the diagonal, where nothing else says


def drift_target(
    weight: Tensor, moments: Tensor, shift: Tensor, damping: float | None = None
) -> Tensor:
    """What to round so that a matrix gives its original outputs for inputs that have drifted.

    Inputs were x_t and are y_t.  With ``H = sum_t u_t y_t y_t^T`` and ``l`` the damping,

        sum_t u_t |W x_t - Q y_t|^2 + l |Q - W|^2 = tr((Q - W') (H + l) (Q - W')^T) + constant,
        W' = W + W (sum_t u_t (x_t - y_t) y_t^T) (H + l)^-1:

    a rounding method that is given W' and H for W works on the left side.

    Args:
        weight: W [rows, cols], float32.
        moments: H [cols, cols].
        shift: ``sum_t u_t (x_t - y_t) y_t^T`` [cols, cols].
        damping: ``l`` as a multiple of the mean diagonal of H.

    Returns:
        W' [rows, cols].

    Raises:
        ValueError: If H has NaN or Inf.

    References:
        Li et al. (2025), "GPTAQ: efficient finetuning-free quantization for asymmetric
        calibration"; Zhang et al. (2025), "Qronos: correcting the past by shaping the future".

    Example:
        >>> weight, moments = torch.ones(1, 2), torch.eye(2)  # inputs were twice what they are
        >>> drift_target(weight, moments, moments, damping=0.25)
        tensor([[1.8000, 1.8000]])
    """
    factors = factor(moments, DAMPING if damping is None else damping, dead=1)
    upper, pivots = factors.feedback[0], factors.pivots[0]  # H + l = R D R^T
    wanted = weight @ shift
    wanted = torch.linalg.solve_triangular(upper.mT, wanted, upper=False, left=False)
    wanted = torch.linalg.solve_triangular(upper, wanted / pivots, upper=True, left=False)
    corrected: Tensor = weight + wanted
    return corrected

"""Round to nearest, on the grid with the least weighted squared error per group."""

from __future__ import annotations

import math

from torch import Tensor

from ..format import Fitted, Format, family_of, fit
from ..packed import PackedTensor
from . import METHODS, Evidence


def fit_grid(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Fitted | None:
    r"""Fit a grid to ``weight`` [rows, cols]; rounding to nearest on it is ``render``.

    Every family fits its own grids (``Family.fit``).  In an integer format, per group of weights
    w_i with root mean square r, the scale and the zero point minimize

        sum_i (|w_i| + r) (w_i - rendered_i)^2

    over clipping ratios (1, no clipping, among them), neighbouring zero points, and the
    least-squares scales of the codes found.  The factor |w_i| + r is there because large
    weights matter more to a network than their share of the squared error: without it, clip
    search gave *more* KL divergence than no clip search for int3- and int4-g64-asym on SmolLM2.

    Args:
        weight: The weight.
        fmt: The format.
        importance: What takes the place of that factor, if it is known: the diagonal of the loss's
            curvature, [cols] or [rows, cols], not negative. The search then goes further inside. A
            family whose ``fit`` has no parameter of that name goes without.

    Returns:
        The grid, or what else the family keeps of the weight; None for a float format.

    Raises:
        ValueError: If the weight has NaN or Inf, or values too large for a float16 scale (or
            for ``fp16`` itself); or if importance has, or is negative.

    >>> import torch
    >>> weight, fmt = torch.tensor([[-1.0, 0.5, 3.0, 3.0]]), Format.parse("int2-gc-asym")
    >>> grid = fit_grid(weight, fmt)
    >>> grid.scale, grid.zero
    (tensor([[1.4639]], dtype=torch.float16), tensor([[1]], dtype=torch.uint8))
    """
    weight = weight.detach()
    family_of(fmt).check(weight, fmt)
    if importance is not None:
        least, most = (float(end) for end in importance.aminmax())
        if not 0 <= least <= most < math.inf:
            raise ValueError(
                f"The importance of weights goes from {least:g} to {most:g}: it is the diagonal of "
                "a curvature, which is finite and not negative."
            )
    return fit(weight, fmt, importance)


@METHODS.register("rtn", grid=fit_grid)
def rtn(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
    """Round to nearest, on the grid with the least weighted squared error per group.

    Args:
        weight: The weight [rows, cols], float32.
        fmt: The format.
        evidence: Not looked at.

    Raises:
        ValueError: As :func:`fit_grid`.

    References:
        Clip search by squared error: OCTAV, Sakr et al. (2022).  Weighting by magnitude is what
        the k-quants of llama.cpp do without an importance matrix.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[-0.4, 0.0, 0.1, 0.3]])
        >>> packed = rtn(weight, Format.parse("int3-gc-asym"), Evidence())
        >>> packed.dequantize()
        tensor([[-0.3999,  0.0000,  0.1000,  0.2999]])
        >>> packed.nbytes  # 2 of codes, 2 of the scale, 1 of the zero point
        5
    """
    return PackedTensor.pack(weight, fmt, fit_grid(weight, fmt))

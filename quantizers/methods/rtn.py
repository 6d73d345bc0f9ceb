"""Round to nearest, on the grid with the least weighted squared error per group."""

from __future__ import annotations

from torch import Tensor

from ..format import Fitted, Format, family_of
from ..packed import PackedTensor
from . import METHODS, Evidence


def fit_grid(weight: Tensor, fmt: Format) -> Fitted | None:
    r"""Fit a grid to ``weight`` [rows, cols]; rounding to nearest on it is ``render``.

    Every family fits its own grids (``Family.fit``).  In an integer format, per group of weights
    w_i with root mean square r, the scale and the zero point minimize

        sum_i (|w_i| + r) (w_i - rendered_i)^2

    over clipping ratios (1, no clipping, among them), neighbouring zero points, and the
    least-squares scales of the codes found.  The factor |w_i| + r is there because large
    weights matter more to a network than their share of the squared error: without it, clip
    search gave *more* KL divergence than no clip search for int3- and int4-g64-asym on SmolLM2.

    Returns:
        The grid, or what else the family keeps of the weight; None for a float format.

    Raises:
        ValueError: If the weight has NaN or Inf, or values too large for a float16 scale (or
            for ``fp16`` itself).

    >>> import torch
    >>> weight, fmt = torch.tensor([[-1.0, 0.5, 3.0, 3.0]]), Format.parse("int2-gc-asym")
    >>> grid = fit_grid(weight, fmt)
    >>> grid.scale, grid.zero
    (tensor([[1.4639]], dtype=torch.float16), tensor([[1]], dtype=torch.uint8))
    """
    family, weight = family_of(fmt), weight.detach()
    family.check(weight, fmt)
    fitted: Fitted | None = family.fit(weight, fmt)
    return fitted


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

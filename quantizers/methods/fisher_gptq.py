"""GPTQ on the curvature of the KL: grids fitted on the way, then scales and codes in turn."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from .. import rounding
from ..feedback import Quadratic
from ..format import PER_TENSOR, Family, Format, family_of
from ..grid import line_of
from ..grid_fit import LEAST_RATIO
from ..lines import Grid
from ..packed import PackedTensor
from ..sweep import Lattice, chunks
from . import METHODS, Evidence
from .rtn import rtn

DAMPING = 0.07  # of the mean of the diagonal, where no held-out sequences say
RATIOS = {
    bits: torch.linspace(1, 0.9 * least, 8).tolist() for bits, least in LEAST_RATIO.items()
}
SWEEPS = 4  # of coordinate descent over all columns


def has_own_codes(fmt: Format) -> bool:
    """Whether it has codes of its own for a format: all but floats."""
    return not fmt.floating


@METHODS.register("fisher_gptq", needs={"fisher"}, rounds=has_own_codes)
def fisher_gptq(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
    """Round so that the KL grows least: columns in turn with feedback, then scales, then codes.

    What errors E = W - Q cost is ``tr(E H E^T)``, H the damped curvature of the KL (``fisher``).

    1. Columns are rounded one after the other as by GPTQ, ``H = R D R^T``: column j to the nearest
       of ``W_j + sum_{i<j} E_i R_ij``.  The groups with the largest diagonals of H come first, and
       in a group the columns with the largest.
    2. The grid of a group of an integer format is fitted when the group is reached, to the weights
       as they then are: the squared error of column j weighs ``D_j``, what is left of it after
       feedback.  Other grids (of rows, the tensor, nf4, llama.cpp's blocks) are those of the
       family for the importance ``diag H``, before the first column.
    3. The float16 scales of each row are solved for jointly, codes as they are.
    4. Coordinate descent on the codes; and scales once more.

    Neither 3 nor 4 raises the cost of a row.  Rows are independent, and what becomes of one depends
    neither on the number of threads nor on which others come with it.  Where nothing is known of
    the curvature weights are rounded to nearest, and so are floats.

    Args:
        weight: The weight [rows, cols], float32.
        fmt: The format.
        evidence: With the curvature.

    Raises:
        ValueError: If the weight or the curvature has NaN or Inf, or values too large for a float16
            scale.

    References:
        Frantar et al. (2023), "GPTQ"; weighted by gradients: Kim et al. (2025), "GuidedQuant";
        both sides of the curvature: Tseng et al. (2025), "YAQA"; order within groups: Gafni et al.
        (2025), "Dual precision quantization"; descent: Behdin et al. (2023), "QuantEase".

    Example:
        >>> weight = torch.tensor([[0.3, 0.3, 0.3, 1.0]])
        >>> evidence = Evidence(fisher=0.9 + 0.1 * torch.eye(4))  # errors that go together
        >>> for method in (rtn, fisher_gptq):
        ...     packed = method(weight, Format.parse("int2-gc"), evidence)
        ...     error = packed.dequantize() - weight
        ...     print(packed.dequantize()[0], f"{(error @ evidence.fisher @ error.T).item():.3f}")
    """
    if evidence.fisher is None or not has_own_codes(fmt):
        return rtn(weight, fmt, evidence)
    weight = weight.detach().float().contiguous()
    family_of(fmt).check(weight, fmt)
    parts = evidence.fisher.numel() // evidence.fisher.shape[-1] ** 2
    if len(weight) % parts or weight.shape[1] != evidence.fisher.shape[-1]:
        raise ValueError(
            f"A weight {list(weight.shape)} does not go with the curvature "
            f"{list(evidence.fisher.shape)} of its columns: [cols, cols] or [parts, cols, cols]."
        )
    base = fmt.base or fmt
    quadratic = _quadratic(evidence, base, weight.shape[1])
    codes, grid = _round(weight, base, quadratic, evidence)
    return PackedTensor.of_codes(codes, base, grid)

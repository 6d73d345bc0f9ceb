"""GPTQ: round column by column, each weight making up for the errors of those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..feedback import factor
from ..format import Format
from ..lines import Grid
from ..packed import PackedTensor
from ..sweep import Cells, Lattice, Sweep, chunks
from . import METHODS, Evidence
from .rtn import fit_grid, rtn

DAMPING = 0.01  # of the mean of the diagonal
BLOCK = 128  # columns between two products with all errors so far, where groups do not say


def has_own_codes(fmt: Format) -> bool:
    """Whether GPTQ has codes of its own for a format: if it is one of integers."""
    return fmt.integer


@METHODS.register("gptq", needs={"hessian"}, rounds=has_own_codes)
def gptq(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
    """Round each column so that it makes up for the rounding errors of the columns before it.

    With errors E = W - Q and the inputs' second moment H = R D R^T, R unit upper triangular, the
    mean squared error of the outputs is ``tr(E H E^T) = sum_j D_j |E_j + sum_{i<j} E_i R_ij|^2``:
    column j is rounded to the nearest of ``W_j + sum_{i<j} E_i R_ij``. These are the codes of the
    paper, whose factor of the inverse of H is the inverse of this one; nothing is inverted here.

    The scale and zero point of a group are fitted when its first column is reached, to the weights
    as they then are; those of a whole row or matrix before the first column.  H gets 0.01 of its
    mean diagonal added, ten times as much again until its factor exists.  Columns that no input
    reached, and matrices without inputs' second moments (lookup tables), are rounded to nearest;
    so are formats other than integers: floats and llama.cpp's blocks.

    Args:
        weight: The weight [rows, cols], float32.
        fmt: The format.
        evidence: With the Hessian.

    Raises:
        ValueError: If the weight or the Hessian has NaN or Inf, or values too large for a float16
            scale.

    References:
        Frantar et al. (2023), "GPTQ: Accurate Post-Training Quantization for Generative
        Pre-trained Transformers", algorithm 1.  The form with errors of the original weights is
        LDLQ, Chee et al. (2023), "QuIP", theorem 6.

    Example:
        >>> weight = torch.tensor([[0.3, 0.3, 0.3, 1.0]])
        >>> evidence = Evidence(hessian=0.9 + 0.1 * torch.eye(4))  # inputs that go together
        >>> for method in (rtn, gptq):
        ...     packed = method(weight, Format.parse("int2-gc"), evidence)
        ...     error = packed.dequantize() - weight
        ...     print(packed.dequantize()[0], f"{(error @ evidence.hessian @ error.T).item():.3f}")
        tensor([0.4414, 0.4414, 0.4414, 0.8828]) 0.092
        tensor([0.4414, 0.4414, -0.0000, 0.8828]) 0.031
    """
    if evidence.hessian is None or not has_own_codes(fmt):
        return rtn(weight, fmt, evidence)
    feedback = evidence.kept.get("feedback")
    if feedback is None:
        feedback = factor(evidence.hessian, DAMPING, dead=1).feedback
        evidence.kept["feedback"] = feedback
    weight = weight.detach().float()
    if len(weight) % len(feedback) or weight.shape[1] != feedback.shape[-1]:
        raise ValueError(
            f"A weight {list(weight.shape)} does not go with the second moments "
            f"{list(evidence.hessian.shape)} of its inputs: [cols, cols] or [parts, cols, cols]."
        )
    codes, grid = _round(weight, fmt, feedback)
    return PackedTensor.of_codes(codes, fmt, grid)


def _round(weight: Tensor, fmt: Format, feedback: Tensor) -> tuple[Tensor, Grid]:
    """Codes, uint8 [rows, cols], and their grid."""
    parts, cols = feedback.shape[:2]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grouped = fmt.group_size > 0
    grid = None if grouped else fit_grid(weight, fmt)
    assert grid is None or isinstance(grid, Grid)
    lattice = Lattice.empty(fmt, weight) if grid is None else Lattice.of(fmt, grid, *weight.shape)
    for some, rows in chunks(parts, len(weight) // parts, cols):
        shape = (some.stop - some.start, -1, cols)
        sweep = Sweep(weight[rows].view(shape), feedback[some], fmt.bits)
        scale, zero = (part[rows].view(*shape[:2], part.shape[1]) for part in lattice[:2])
        size = fmt.group_size if grouped else BLOCK
        for start in range(0, cols, size):
            group = start // size if grouped else 0
            target = sweep.target(start, min(start + size, cols))
            if grouped:
                _fit(sweep.expected(target, start), fmt, scale[:, :, group], zero[:, :, group])
            sweep.round(target, start, Cells.of(scale[:, :, group], zero[:, :, group]))
        codes[rows] = sweep.code.transpose(1, 2).reshape(-1, cols)
    return codes, lattice.grid(fmt) if grid is None else grid


def _fit(weight: Tensor, fmt: Format, scale: Tensor, zero: Tensor) -> None:
    """Fill in scales and zero points [parts, rows] of a group [parts, columns, rows]."""
    grid = fit_grid(weight.transpose(1, 2).reshape(-1, weight.shape[1]), fmt)
    assert isinstance(grid, Grid)
    scale.copy_(grid.scale.view(scale.shape))
    if grid.zero is not None:
        zero.copy_(grid.zero.view(zero.shape))

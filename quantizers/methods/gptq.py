"""GPTQ: round column by column, each weight making up for the errors of those before it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..format import Format
from ..lines import CHUNK, Grid
from ..packed import PackedTensor
from . import METHODS, Evidence
from .rtn import fit_grid, rtn

DAMPING = 0.01  # of the mean of the diagonal
BLOCK = 128  # columns between two products with all errors so far, where groups do not say
ATTEMPTS = 8  # each with ten times the damping, the first two with the same


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
        feedback = evidence.kept["feedback"] = _feedback(evidence.hessian)
    weight = weight.detach().float()
    if len(weight) % len(feedback) or weight.shape[1] != feedback.shape[-1]:
        raise ValueError(
            f"A weight {list(weight.shape)} does not go with the second moments "
            f"{list(evidence.hessian.shape)} of its inputs: [cols, cols] or [parts, cols, cols]."
        )
    rounded, grid = _round(weight, fmt, feedback)
    return PackedTensor.pack(rounded, fmt, grid)  # exact: every value lies on its grid


def _feedback(hessian: Tensor) -> Tensor:
    """The factor R [parts, cols, cols] of damped H = R D R^T, unit upper triangular.

    Reversing rows and columns turns the lower Cholesky factor of the reversed H into an upper
    one.
    """
    hessian = hessian.reshape(-1, *hessian.shape[-2:])
    if not hessian.isfinite().all():
        raise ValueError("The second moments of a weight's inputs have NaN or Inf.")
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0  # no input: any value leaves the other columns alone
    live = (~dead).sum(-1).clamp_(min=1)
    mean = diagonal.sum(-1) / live
    mean = torch.where(mean > 0, mean, 1)
    damping = DAMPING * mean
    for attempt in range(ATTEMPTS):
        damped = hessian.double() if attempt else hessian.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(torch.where(dead, mean[:, None], damping[:, None]))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(-2, -1))
        if not failed.any() and lower.isfinite().all():
            factor: Tensor = lower.flip(-2, -1)
            return (factor / factor.diagonal(dim1=-2, dim2=-1)[:, None]).to(hessian.dtype)
        if attempt:
            damping = torch.where(failed > 0, 10 * damping, damping)
    raise ValueError(
        f"The second moments {list(hessian.shape)} of a weight's inputs have no Cholesky factor, "
        f"even with {float((damping / mean).max()) / 10:g} of their mean diagonal added. Calibrate "
        "on more data."
    )


def _round(weight: Tensor, fmt: Format, feedback: Tensor) -> tuple[Tensor, Grid]:
    """Rounded values [rows, cols], each on the grid that comes with them."""
    parts, cols = feedback.shape[:2]
    blocks = weight.view(parts, -1, cols)
    rounded = torch.empty_like(blocks)
    if fmt.group_size > 0:
        shape = (*blocks.shape[:2], fmt.groups(cols))
        scale = torch.empty(shape, dtype=torch.float16, device=weight.device)
        zero = torch.empty(shape, dtype=torch.uint8, device=weight.device)
        for some, rows in _chunks(blocks):
            _round_groups(
                blocks[some, rows],
                fmt,
                feedback[some],
                rounded[some, rows],
                (scale[some, rows], zero[some, rows]),
            )
        scale, zero = scale.flatten(0, 1), zero.flatten(0, 1)
        return rounded.flatten(0, 1), Grid(scale, None if fmt.symmetric else zero)
    grid = fit_grid(weight, fmt)
    assert isinstance(grid, Grid)
    scale, zero = _lines(grid, fmt)
    every = (*blocks.shape[:2], 1)
    scale, zero = (part.expand(len(weight), 1).reshape(every) for part in (scale, zero))
    for some, rows in _chunks(blocks):
        sweep = _Sweep(blocks[some, rows], feedback[some], rounded[some, rows], fmt.bits)
        for start in range(0, cols, BLOCK):
            target = sweep.target(start, min(start + BLOCK, cols))
            sweep.round(target, start, scale[some, rows, 0], zero[some, rows, 0])
        sweep.finish()
    return rounded.flatten(0, 1), grid


def _round_groups(
    weight: Tensor, fmt: Format, feedback: Tensor, out: Tensor, grid: tuple[Tensor, Tensor]
) -> None:
    """Round rows [parts, rows, cols] group by group, filling in their grid as it goes."""
    sweep = _Sweep(weight, feedback, out, fmt.bits)
    parts, count, cols = weight.shape
    for group, start in enumerate(range(0, cols, fmt.group_size)):
        target = sweep.target(start, min(start + fmt.group_size, cols))
        size = target.shape[1]
        fitted = fit_grid(sweep.expected(target, start).transpose(1, 2).reshape(-1, size), fmt)
        assert isinstance(fitted, Grid)
        scale, zero = (part.expand(parts * count, 1) for part in _lines(fitted, fmt))
        scale, zero = scale.view(parts, count), zero.view(parts, count)
        grid[0][:, :, group], grid[1][:, :, group] = scale.half(), zero.to(torch.uint8)
        sweep.round(target, start, scale, zero)
    sweep.finish()


class _Sweep:
    """One sweep over the columns of some rows, kept transposed so that columns lie in memory.

    Args:
        weight: [parts, rows, cols].
        feedback: R [parts, cols, cols].
        out: Where the rounded values go, [parts, rows, cols].
        bits: Bits per code.
    """

    def __init__(self, weight: Tensor, feedback: Tensor, out: Tensor, bits: int) -> None:
        self.weight = weight.transpose(1, 2).contiguous()
        self.feedback, self.out, self.most = feedback, out, 2**bits - 1
        self.error = torch.zeros_like(self.weight)
        self.value = torch.empty_like(self.weight)

    def target(self, start: int, end: int) -> Tensor:
        """Columns [parts, end - start, rows] with the errors before ``start`` made up for."""
        weight = self.weight[:, start:end]
        back = self.feedback[:, :start, start:end].transpose(1, 2)
        return torch.baddbmm(weight, back, self.error[:, :start])

    def expected(self, target: Tensor, start: int) -> Tensor:
        """What the columns of ``target`` would best be if they were not rounded, same shape.

        Targets count on no error in the columns since ``start``; here each of these makes up for
        the errors before ``start`` as well. These are the updated weights of the paper.
        """
        end = start + target.shape[1]
        weight = self.weight[:, start:end]
        back = self.feedback[:, start:end, start:end].transpose(1, 2)
        made_up: Tensor = torch.linalg.solve_triangular(
            back, target - weight, upper=False, unitriangular=True
        )
        return weight + made_up

    def round(self, target: Tensor, start: int, scale: Tensor, zero: Tensor) -> None:
        """Round the columns from ``start`` on, on scales and zero points [parts, rows]."""
        inverse = torch.where(scale == 0, 0, 1 / scale)
        end = start + target.shape[1]
        for column in range(start, end):
            code = torch.addcmul(zero, target[:, column - start], inverse)
            code.round_().clamp_(0, self.most)
            value = torch.mul(code.sub_(zero), scale, out=self.value[:, column])
            error = torch.sub(self.weight[:, column], value, out=self.error[:, column])
            if column + 1 < end:
                back = self.feedback[:, column, column + 1 : end, None]
                target[:, column + 1 - start :].addcmul_(back, error[:, None])

    def finish(self) -> None:
        """Hand over the rounded values."""
        self.out.copy_(self.value.transpose(1, 2))


def _lines(grid: Grid, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scales and zero points as float32, shaped like the grid's scales."""
    scale = grid.scale.float()
    if grid.zero is None:
        return scale, torch.full_like(scale, fmt.zero_point)
    return scale, grid.zero.float()


def _chunks(blocks: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts and rows of [parts, rows, cols] that hold about ``CHUNK`` weights."""
    parts, count, cols = blocks.shape
    step = max(1, CHUNK // max(1, cols))
    if count >= step:
        for part in range(parts):
            for start in range(0, count, step):
                yield slice(part, part + 1), slice(start, start + step)
        return
    some = step // max(1, count)
    for first in range(0, parts, some):
        yield slice(first, first + some), slice(None)

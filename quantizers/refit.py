"""Better scales for given codes, by the whole curvature of the loss in a row.

With errors E = W - Q of a row and a curvature H [cols, cols], the row costs ``E H E^T``.  With its
codes fixed, Q is linear in what scales them: with a basis B_i [cols] for every scale i of the row
(its levels in the columns of a group, 0 elsewhere), a change x of the scales changes the cost by
``x A x^T - 2 x b``, where ``A_ij = B_i H B_j^T`` and ``b_i = B_i H E^T``.

References:
    Kim et al. (2025), "GuidedQuant: large language model quantization via exploiting end loss
    guidance": its LNQ alternates between codes and the least-squares codebook of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .lines import CHUNK

RIDGE = 1e-3  # of the diagonal: scales that the data hardly tell apart stay where they are
SURE = 1e-5  # a gain below this share of its terms may be none


def refit_scales(
    weight: Tensor, levels: Tensor, scale: Tensor, hessian: Tensor, group_size: int = 0
) -> Tensor:
    """The scales that make ``sum_r E_r H E_r^T`` least, all those of a row together.

    Args:
        weight: W [rows, cols], float32, less whatever is added to ``scale * levels``.
        levels: What scales multiply, float32 [rows, cols]: codes less zero points, for integers.
        scale: Present scales [rows, groups], or [1, 1] for one that all rows share.
        hessian: H [cols, cols], float32, symmetric, without negative eigenvalues.
        group_size: Columns of a group, of which the last may have fewer; 0 if all have as many.

    Returns:
        Scales, float16, shaped like ``scale``. A row keeps its present ones unless the others cost
        less, and a group the one that would change its sign or leave float16.

    Example:
        >>> weight, levels = torch.tensor([[0.8, 1.2]]), torch.tensor([[1.0, 1.0]])
        >>> for hessian in (torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])):
        ...     print(refit_scales(weight, levels, torch.tensor([[0.8]]), hessian))
        tensor([[1.]], dtype=torch.float16)
        tensor([[1.0996]], dtype=torch.float16)
    """
    size = group_size if group_size > 0 else levels.shape[1] // scale.shape[1]
    shared = len(scale) == 1
    found, sums = [], []
    for rows in equation_chunks(weight.shape, scale.shape[1]):
        some, old = levels[rows].T.contiguous(), scale if shared else scale[rows]
        error = weight[rows].T - some * widen(old.T.float(), size, len(some))
        left, right = equations(some, hessian, size), right_sides(hessian @ error, some, size)
        if shared:
            sums.append((left.sum(2, keepdim=True), right.sum(1, keepdim=True)))
        else:
            found.append(improve(old, left, right))
    if shared:
        return improve(scale, *(torch.stack(part).sum(0) for part in zip(*sums, strict=True)))
    return torch.cat(found)


def equation_chunks(shape: Sequence[int], unknowns: int) -> Iterator[slice]:
    """Slices over rows [rows, cols] whose weights, and whose equations, are about ``CHUNK``."""
    step = max(1, CHUNK // max(1, shape[1], unknowns**2 // 4))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def equations(levels: Tensor, hessian: Tensor, size: int, offsets: bool = False) -> Tensor:
    """The A of the scales of all groups of some rows.

    Args:
        levels: What scales multiply [cols, rows]: transposed, as all here, so that rows, which
            are many and independent, lie next to each other.
        hessian: H [cols, cols].
        size: Columns of a group, of which the last may have fewer.
        offsets: Whether groups have offsets as well, which multiply 1.

    Returns:
        A [unknowns, unknowns, rows]; unknowns are the scales of all groups, then their offsets.
    """
    (cols, rows), groups = levels.shape, math.ceil(len(levels) / size)
    kinds = 2 if offsets else 1
    left = levels.new_empty(kinds, groups, kinds, groups, rows)
    summed = group_sums(hessian, size)
    for group, start in enumerate(range(0, cols, size)):
        here, upto = slice(start, min(start + size, cols)), slice(0, min(start + size, cols))
        sums = group_sums((hessian[upto, here] @ levels[here]).mul_(levels[upto]), size)
        left[0, group, 0, : group + 1] = sums
        left[0, : group + 1, 0, group] = sums
        if offsets:
            sums = summed[:, here] @ levels[here]
            left[0, group, 1] = sums
            left[1, :, 0, group] = sums
    if offsets:
        left[1, :, 1] = group_sums(summed.T.contiguous(), size).T[..., None]
    return left.view(kinds * groups, kinds * groups, rows)


def right_sides(gradient: Tensor, levels: Tensor, size: int, offsets: bool = False) -> Tensor:
    """The b [unknowns, rows] that go with ``equations``, for a gradient H E^T [cols, rows]."""
    sums = [group_sums(gradient * levels, size)]
    return torch.cat([*sums, group_sums(gradient, size)] if offsets else sums)


def improve(scale: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The least-squares scales [rows, unknowns], float16, in rows that cost less with them.

    A scale that would change its sign or leave float16 stays as it is.
    """
    left, right, old = left.movedim(2, 0).contiguous(), right.T.contiguous(), scale.float()
    new = (old + _least_squares(left, right)).half().float()
    new = torch.where(new.isfinite() & (new * old > 0), new, old)
    change = new - old
    quadratic, linear = (change * (left @ change[..., None])[..., 0]).sum(1), change * right
    better = quadratic - 2 * linear.sum(1) < -SURE * linear.abs().sum(1)
    return torch.where(better[:, None], new, old).half()


def _least_squares(left: Tensor, right: Tensor) -> Tensor:
    """The x [rows, n] that make ``x A x^T - 2 x b`` least, and near 0 where it hardly matters."""
    size = left.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0)
    unit = left * inverse[:, :, None] * inverse[:, None]
    unit.diagonal(dim1=1, dim2=2).fill_(1 + RIDGE)
    factor, failed = torch.linalg.cholesky_ex(unit)
    found = torch.cholesky_solve((right * inverse)[..., None], factor)[..., 0] * inverse
    return torch.where((failed[:, None] == 0) & found.isfinite(), found, 0)


def group_sums(values: Tensor, size: int) -> Tensor:
    """Sums [groups, n] of [cols, n] over groups of ``size``, of which the last may have fewer."""
    full = len(values) // size
    sums = values[: full * size].view(full, size, values.shape[1]).sum(1)
    rest = values[full * size :]
    return torch.cat([sums, rest.sum(0, keepdim=True)]) if len(rest) else sums


def widen(scale: Tensor, size: int, cols: int) -> Tensor:
    """Scales [groups, rows] for every column of their groups: [cols, rows]."""
    return scale.repeat_interleave(size, 0)[:cols]

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

from .lines import CHUNK, grouped

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
        tensor([[1.0000]], dtype=torch.float16)
        tensor([[1.0996]], dtype=torch.float16)
    """
    size = group_size if group_size > 0 else levels.shape[1] // scale.shape[1]
    shared = len(scale) == 1
    found, sums = [], []
    for rows in equation_chunks(weight.shape, scale.shape[1]):
        some, old = levels[rows], scale if shared else scale[rows]
        error = weight[rows] - some * widen(old.float(), size, some.shape[1])
        equations = normal_equations(error @ hessian, [some], hessian, size)
        if shared:
            sums.append([part.sum(0, keepdim=True) for part in equations])
        else:
            found.append(improve(old, *equations))
    if shared:
        return improve(scale, *(torch.stack(part).sum(0) for part in zip(*sums, strict=True)))
    return torch.cat(found)


def equation_chunks(shape: Sequence[int], unknowns: int) -> Iterator[slice]:
    """Slices over rows [rows, cols] whose weights, and whose equations, are about ``CHUNK``."""
    step = max(1, CHUNK // max(1, shape[1], unknowns**2 // 4))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def normal_equations(
    gradient: Tensor, bases: Sequence[Tensor], hessian: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """A and b of the changes of some scales of every group.

    Args:
        gradient: E H [rows, cols].
        bases: What the scales multiply, one tensor for each kind of scale: [rows, cols], or
            [1, cols] if it is the same in all rows.
        hessian: H [cols, cols].
        size: Columns of a group, of which the last may have fewer.

    Returns:
        A [rows, unknowns, unknowns] and b [rows, unknowns], of which there are one of the first
        kind for every group, then those of the second kind.
    """
    (rows, cols), kinds = gradient.shape, len(bases)
    groups = math.ceil(cols / size)
    right = torch.stack([group_sums(gradient * basis, size) for basis in bases], 1)
    left = gradient.new_empty(rows, kinds, groups, kinds, groups)
    for group, start in enumerate(range(0, cols, size)):
        end, upto = min(start + size, cols), slice(0, group + 1)
        for i, first in enumerate(bases):
            product = first[:, start:end] @ hessian[start:end, :end]
            for j, second in enumerate(bases):
                sums = group_sums(product * second[:, :end], size)
                left[:, i, group, j, upto] = sums
                left[:, j, upto, i, group] = sums
    return left.flatten(3).flatten(1, 2), right.flatten(1)


def least_squares(left: Tensor, right: Tensor) -> Tensor:
    """The x [rows, n] that make ``x A x^T - 2 x b`` least, next to it for scales of no account."""
    size = left.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0)
    unit = left * inverse[:, :, None] * inverse[:, None]
    unit.diagonal(dim1=1, dim2=2).copy_(torch.full_like(size, 1 + RIDGE))
    factor, failed = torch.linalg.cholesky_ex(unit)
    found = torch.cholesky_solve((right * inverse)[..., None], factor)[..., 0] * inverse
    return torch.where((failed[:, None] == 0) & found.isfinite(), found, 0)


def falls(change: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Whether a change x [rows, n] makes rows cost less, beyond the errors of float32: [rows]."""
    quadratic = (change * (left @ change[..., None])[..., 0]).sum(1)
    linear = change * right
    return quadratic - 2 * linear.sum(1) < -SURE * linear.abs().sum(1)


def improve(scale: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The least-squares scales [rows, n] of the equations, float16, where rows then cost less."""
    old = scale.float()
    new = (old + least_squares(left, right)).half().float()
    new = torch.where(new.isfinite() & (new * old > 0), new, old)
    better = falls(new - old, left, right)
    return torch.where(better[:, None], new, old).half()


def group_sums(values: Tensor, size: int) -> Tensor:
    """Sums [rows, groups] over groups of ``size`` columns, of which the last may have fewer."""
    return torch.cat([block.sum(2) for block, _ in grouped(values, size)], 1)


def widen(scale: Tensor, size: int, cols: int) -> Tensor:
    """Scales [rows, groups] for every column of their groups: [rows, cols]."""
    return scale.repeat_interleave(size, 1)[:, :cols]

"""Round to nearest, on the grid with the least squared error per group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import PER_TENSOR, Format
from ..grid import Grid, group_blocks, row_chunks
from . import METHODS

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)


@METHODS.register("rtn")
def rtn(weight: Tensor, fmt: Format) -> Grid | None:
    """Fit the grid."""
    if fmt.kind == "float":
        return None
    if fmt.group_size == PER_TENSOR:
        scale, zero = _fit(weight.reshape(1, -1), fmt)
        return Grid(scale.view(1, 1), None if fmt.symmetric else zero.view(1, 1))
    shape = (weight.shape[0], fmt.groups(weight.shape[1]))
    grid = Grid(
        torch.empty(shape, dtype=torch.float16),
        None if fmt.symmetric else torch.empty(shape, dtype=torch.uint8),
    )
    for rows in row_chunks(weight.shape):
        for block, groups in group_blocks(weight[rows], fmt):
            scale, zero = _fit(block.reshape(-1, block.shape[2]), fmt)
            grid.scale[rows, groups] = scale.view(block.shape[:2])
            if grid.zero is not None:
                grid.zero[rows, groups] = zero.view(block.shape[:2])
    return grid


def _fit(groups: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    low = groups.amin(1).clamp_(max=0)
    high = groups.amax(1).clamp_(min=0)
    if fmt.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    levels = 2**fmt.bits - 1
    best_error = torch.full_like(low, torch.inf)
    best_scale = torch.zeros_like(low, dtype=torch.float16)
    best_zero = torch.zeros_like(low)
    for ratio in RATIOS:
        scale = ((high - low) * (ratio / levels)).half()
        wide = scale.float()
        inverse = torch.where(wide == 0, 0, 1 / wide)
        if fmt.symmetric:
            zero = torch.full_like(low, fmt.zero_point)
        else:
            zero = (-low * ratio * inverse).round_().clamp_(0, levels)
        scaled = (groups * inverse[:, None]).add_(zero[:, None])
        codes = scaled.round().clamp_(0, levels)
        error = codes.sub_(scaled).square_().sum(1) * wide.square()
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero.to(torch.uint8)

"""Folds: scales of input channels that move from matrices into what feeds them.

With scales s > 0, ``(W diag(s)) (x / s) = W x``: where x comes out of a norm or of another matrix,
that one can give ``x / s``, and the model computes what it did, to float rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sites import Place, places


@dataclass(frozen=True, slots=True)
class Fold:
    """Where a scale per channel can go.

    Attributes:
        source: Name of the module whose output is divided: a norm, or a linear layer.
        matrices: Names of the matrices whose columns are multiplied: all that the output feeds.
        channels: Number of scales: the output's channels.
        columns: Which channel every column of the matrices is; empty where each is its own. Heads
            of grouped-query attention share those of their group's values.
        offset: What the norm adds to its weight before it multiplies by it (1 for Gemma's, else
            0); None for a linear layer.
    """

    source: str
    matrices: tuple[str, ...]
    channels: int
    columns: tuple[int, ...] = ()
    offset: float | None = None

    def over_columns(self, scale: Tensor) -> Tensor:
        """The scale of every column [cols] from those of the channels [channels]."""
        return scale[list(self.columns)] if self.columns else scale

    def over_channels(self, values: Tensor) -> Tensor:
        """The mean of values of columns [cols] over the columns of each channel [channels]."""
        if not self.columns:
            return values
        index = torch.tensor(self.columns)
        sums = values.new_zeros(self.channels).index_add_(0, index, values)
        return sums / torch.bincount(index, minlength=self.channels)


@torch.no_grad()
def effective_scale(model: nn.Module, fold: Fold, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales near those given that a norm's weight, divided by them, can be stored with.

    Args:
        model: The model, float32, before the fold.
        fold: Where the scales go.
        scale: Positive scales [channels].
        dtype: The checkpoint's own, in which a norm's weight is stored.

    Returns:
        Scales [channels], float32, those of a linear layer as they were: it is rounded anyway.
    """
    scale = scale.detach().float().cpu()
    if fold.offset is None:
        return scale
    before = _weight(model, fold) + fold.offset
    after = (before / scale - fold.offset).to(dtype).float() + fold.offset
    found = before / after
    lost = ~(found.isfinite() & (found > 0))  # a weight of 0, or one that became 0
    return torch.where(lost, torch.ones_like(found), found)


@torch.no_grad()
def apply_fold(model: nn.Module, fold: Fold, scale: Tensor, dtype: torch.dtype) -> None:
    """Move scales, in place: the matrices' columns are multiplied by them, their source is divided.

    Computed on a CPU, so that it gives the same everywhere.

    Args:
        model: The model, float32.
        fold: Where the scales go.
        scale: Scales [channels] as :func:`effective_scale` gives them.
        dtype: The checkpoint's own, in which a norm's weight is stored.
    """
    known = {place.name: place for place in places(model)}
    source = model.get_submodule(fold.source)
    if fold.offset is None:
        multiply(known[fold.source], 1 / scale[:, None])
    else:
        weight = (_weight(model, fold) + fold.offset) / scale - fold.offset
        parameter: Any = source._parameters["weight"]
        parameter.copy_(weight.to(dtype))
    if (bias := source._parameters.get("bias")) is not None:
        bias.copy_(bias.detach().cpu() / scale)
    for name in fold.matrices:
        multiply(known[name], fold.over_columns(scale))


def _weight(model: nn.Module, fold: Fold) -> Tensor:
    weight = model.get_submodule(fold.source)._parameters["weight"]
    assert weight is not None
    return weight.detach().cpu()


@torch.no_grad()
def multiply(place: Place, scale: Tensor) -> None:
    """Multiply a place's matrix [rows, cols] by what broadcasts to it, in place, on a CPU."""
    parameter = place.parameter
    matrix = place.matrix(parameter.detach().cpu())
    parameter.copy_(place.restored(matrix * scale))

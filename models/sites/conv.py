"""Convolutions in one to three dimensions, transposed ones too, with or without groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import SITES, Site, runs_code_of


class Conv(Site):
    """A kernel whose rows are output channels and whose columns are the taps of every input."""

    layer_type = "convolution"

    def takes(self, module: nn.Module, attribute: str, weight: Tensor) -> bool:
        """The weight of any convolution of torch, and of subclasses."""
        return isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight"

    def matrix(self, module: nn.Module, attribute: str, weight: Tensor) -> Tensor:
        """[out, in / groups * taps]: a view, except of a transposed convolution [in, out, ...]."""
        assert isinstance(module, nn.modules.conv._ConvNd)
        if not module.transposed:
            return weight.flatten(1)
        by_group: Tensor = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        return by_group.flatten(0, 1).flatten(1)

    def restored(
        self, module: nn.Module, attribute: str, matrix: Tensor, shape: torch.Size
    ) -> Tensor:
        """See :meth:`Site.restored`."""
        assert isinstance(module, nn.modules.conv._ConvNd)
        if not module.transposed:
            return matrix.reshape(shape)
        groups, outputs, taps = module.groups, shape[1], shape[2:]
        by_group = matrix.reshape(groups, outputs, shape[0] // groups, *taps)
        return by_group.transpose(1, 2).flatten(0, 1)

    def scale(self, module: nn.Module) -> float | None:
        """One or two dimensions, zero padding, and the code of torch."""
        known: Any = module
        plain = runs_code_of(module, nn.Conv2d) or runs_code_of(module, nn.Conv1d)
        return 1.0 if plain and known.padding_mode == "zeros" else None

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """Patches [samples, positions, channel_groups, cols]."""
        conv: Any = module
        if x.dim() == len(conv.kernel_size) + 1:  # one sample without a batch dimension
            x = x[None]
        padding, kernel, dilation, stride = (
            conv.padding,
            conv.kernel_size,
            conv.dilation,
            conv.stride,
        )
        if isinstance(padding, str):  # "same" or "valid"
            x = F.pad(x, conv._reversed_padding_repeated_twice)
            padding = (0,) * len(kernel)
        if len(kernel) == 1:
            x, padding = x.unsqueeze(2), (0, *padding)
            kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        patches = F.unfold(x, kernel, dilation, (int(padding[0]), int(padding[1])), stride)
        patches = patches.unflatten(1, (conv.groups, -1)).permute(0, 3, 1, 2)
        result: Tensor = patches.reshape(samples, -1, *patches.shape[-2:])
        return result

    def deltas(self, module: nn.Module, delta: Tensor, samples: int) -> Tensor:
        """Output gradients [samples, positions, channel_groups, rows / channel_groups]."""
        conv: Any = module
        if delta.dim() == len(conv.kernel_size) + 1:
            delta = delta[None]
        delta = delta.flatten(2).unflatten(1, (conv.groups, -1)).permute(0, 3, 1, 2)
        return delta.reshape(samples, -1, *delta.shape[-2:])


SITES.register("conv")(Conv())

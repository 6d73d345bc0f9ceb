"""What a module is to those who write a model for another tool, packed or not."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .packed_modules import PackedEmbedding, PackedLinear
from .packed_rows import PackedRowsLinear
from .sites import SITES, site_of

LayerKind = Literal["linear", "transposed", "embedding", "convolution", "other"]


def layer_kind(module: nn.Module | None) -> LayerKind:
    """Linear layers [out, in] or transposed [in, out], embeddings, 2-D convolutions, others."""
    if isinstance(module, PackedLinear | PackedRowsLinear):
        return "transposed" if module.transposed else "linear"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding | PackedEmbedding):
        return "embedding"
    if isinstance(module, nn.Conv2d):
        return "convolution"
    weight = None if module is None else module._parameters.get("weight")
    if module is not None and weight is not None and weight.dim() == 2:
        return "transposed" if site_of(module, "weight", weight) == "linear" else "other"
    return "other"


def original_matrix(module: nn.Module | None) -> Tensor | None:
    """The weight of a module that is not packed as a matrix [rows, cols]; None if it has none."""
    weight = None if module is None else module._parameters.get("weight")
    if module is None or weight is None or weight.dim() < 2:
        return None
    return SITES.get(site_of(module, "weight", weight)).matrix(module, "weight", weight)


def conv_options(module: nn.Module) -> tuple[torch.Size, tuple[object, ...]]:
    """The kernel's shape and the stride, padding, dilation and groups of a 2-D convolution."""
    assert isinstance(module, nn.Conv2d)
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    options = (module.stride, module.padding, module.dilation, module.groups)
    return torch.Size(shape), options


def runs_own_code(module: nn.Module) -> bool:
    """Whether a layer computes something else than the class of torch it is derived from."""
    plain = (nn.Linear, nn.Embedding, nn.Conv2d)
    base = next((kind for kind in plain if isinstance(module, kind)), None)
    if base is None:
        return False
    own = type(module).forward is not base.forward
    if isinstance(module, nn.Conv2d):
        own |= type(module)._conv_forward is not nn.Conv2d._conv_forward
        own |= module.padding_mode != "zeros"
    return own

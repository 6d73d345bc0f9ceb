"""What a packed weight becomes for the kernels of one device, made once before it is used.

Every layout multiplies; :func:`prepare` picks one.  The stored parts of a weight remain what is
saved: on a CPU the kernels read those very tensors, and a ``PlaneLayout`` on a GPU lets its module
leave them in main memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..quantizers.packed import PackedTensor
from . import cpu, native
from .backend import kernel_for
from .cpu import CpuWeight
from .launch import PackedMeta, packed_linear


class Layout(Protocol):
    """A weight [rows, cols] that can be multiplied by."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W.T + bias``: x [..., cols] to [..., rows], in the dtype of x."""
        ...


@dataclass(frozen=True, slots=True)
class StoredLayout:
    """The stored parts themselves, through the custom op: any device, compiled or traced."""

    packed: PackedTensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Layout`."""
        if self.packed.fmt.kind == "float":
            return linear(x, self.packed.tensors["weight"].to(x.dtype), bias)
        parts = self.packed.tensors
        meta = PackedMeta.of(self.packed.fmt, self.packed.shape)
        outputs: Tensor = packed_linear(
            x, parts["codes"], parts["scale"], parts.get("zero"), bias, *meta
        )
        return outputs


@dataclass(frozen=True, slots=True)
class CpuLayout:
    """Pointers to the stored parts for the compiled kernels.

    Calls them directly where nobody watches, because a custom op costs more than a small layer
    takes; through the op where gradients, a compiler or a dispatch mode are at work.
    """

    stored: StoredLayout
    weight: CpuWeight

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Layout`."""
        if torch.compiler.is_compiling() or _watched(x, bias):
            return self.stored.linear(x, bias)
        return self.weight.linear(x, bias)


@dataclass(frozen=True, slots=True)
class DenseLayout:
    """A dequantized float32 copy, where nothing else is as fast."""

    weight: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Layout`."""
        bias = None if bias is None else bias.float()
        return linear(x.float(), self.weight, bias).to(x.dtype)


def prepare(packed: PackedTensor) -> Layout:
    """The layout of a weight for the device its parts are on, for the chosen kernels.

    Raises:
        ValueError: If ``BITPLAN_KERNEL`` asks for what cannot be.
    """
    device = next(iter(packed.tensors.values())).device
    stored = StoredLayout(packed)
    kernel = kernel_for(device)
    if kernel == "cpu" and packed.fmt.name != "fp32":
        if native.library() is not None and cpu.faster(packed.fmt):
            return CpuLayout(stored, CpuWeight(packed))
        return DenseLayout(packed.dequantize())
    return stored


def _watched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether more than the numbers of a product is asked for."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return True
    return (
        type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
    )

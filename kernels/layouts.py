"""What a packed weight becomes for the kernels of one device, made once before it is used.

Every layout multiplies; :func:`prepare` picks one.  The stored parts of a weight remain what is
saved: on a CPU the kernels read those very tensors, and where a GPU has a ``PlaneLayout`` the
parts stay in main memory.
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
from .gemm import order_of, plane_linear
from .launch import PackedMeta, packed_linear
from .packing import PlanePack


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
        if not self.packed.fmt.integer:  # whatever it is, it is decoded at every call
            return linear(x, self.packed.dequantize(dtype=x.dtype), bias)
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
        if torch.compiler.is_compiling() or _needs_grad(x, bias) or _traced(x):
            return self.stored.linear(x, bias)
        return self.weight.linear(x, bias)


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """Planes of bits in the order that matrix instructions take, for the Triton kernels.

    Attributes:
        pack: The codes.
        low_rank: The factors [rows, rank] and [rank, cols] of what is added to them, if any.
    """

    pack: PlanePack
    low_rank: tuple[Tensor, Tensor] | None = None

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Layout`."""
        return plane_linear(x, self.pack, bias, low_rank=self.low_rank)


@dataclass(frozen=True, slots=True)
class CorrectedLayout:
    """Codes laid out for a CPU, and the product with their low-rank correction beside it.

    Both in float32, so that the sum is rounded once.

    Attributes:
        codes: The weight without its correction.
        left: Float32 [rows, rank].
        right: Float32 [rank, cols].
    """

    codes: Layout
    left: Tensor
    right: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Layout`."""
        wide = x.float()
        outputs = self.codes.linear(wide, None if bias is None else bias.float())
        return (outputs + linear(linear(wide, self.right), self.left)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class DenseLayout:
    """A dequantized float32 copy, where nothing else is as fast."""

    weight: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Layout`."""
        bias = None if bias is None else bias.float()
        return linear(x.float(), self.weight, bias).to(x.dtype)


def prepare(packed: PackedTensor, device: torch.device) -> Layout:
    """The layout of a weight for the chosen kernels of a device.

    Args:
        packed: The weight; its parts may be on another device.
        device: Where it will be multiplied.

    Raises:
        ValueError: If ``BITPLAN_KERNEL`` asks for what cannot run there.
    """
    kernel = kernel_for(device)
    parts = {name: part.to(device) for name, part in packed.tensors.items()}
    here = PackedTensor(packed.fmt, packed.shape, parts)
    low_rank = (parts["left"], parts["right"]) if packed.fmt.rank else None
    if kernel == "triton" and packed.fmt.layout == "codes":
        return PlaneLayout(PlanePack.from_packed(here, order_of(device)), low_rank)
    if kernel == "cpu" and low_rank:
        left, right = (factor.float() for factor in low_rank)
        return CorrectedLayout(prepare(here.coded(), device), left, right)
    if kernel == "cpu" and cpu.takes(packed.fmt):
        if native.library() is not None and cpu.faster(packed.fmt):
            return CpuLayout(StoredLayout(here), CpuWeight(here))
        return DenseLayout(here.dequantize())
    return StoredLayout(here)


def _needs_grad(x: Tensor, bias: Tensor | None) -> bool:
    """Whether gradients of a product will be asked for."""
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    return wanted and torch.is_grad_enabled()


def _traced(x: Tensor) -> bool:
    """Whether somebody looks at operations instead of numbers.

    Fake and meta tensors, dispatch modes, function transforms, and the tracer of TorchScript.
    """
    return (
        type(x) is not Tensor
        or not x.is_cpu
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._is_tracing()
    )

"""The operators of packed weights, as torch custom ops: they compile, export and trace.

The tensors are the stored parts of a packed weight (see ``Format.tensors``); everything else
about it travels as ``PackedMeta``, spread over the integer arguments of the op.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quantizers.format import Format
from ..quantizers.packed import PackedTensor
from . import native, reference
from .backend import kernel_for
from .cpu import CpuWeight


class PackedMeta(NamedTuple):
    """What the tensors of a packed weight [rows, cols] do not say about it.

    Attributes:
        bits: Bits per code.
        group_size: Weights per scale, or ``PER_CHANNEL`` or ``PER_TENSOR``.
        symmetric: Whether the zero point is implicit.
        rows: Output features.
        cols: Input features.
    """

    bits: int
    group_size: int
    symmetric: bool
    rows: int
    cols: int

    @staticmethod
    def of(fmt: Format, shape: tuple[int, int]) -> PackedMeta:
        """The metadata of a weight [rows, cols] in an integer format."""
        return PackedMeta(fmt.bits, fmt.group_size, fmt.symmetric, *shape)

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> PackedTensor:
        """The weight made of this metadata and its stored parts.

        Raises:
            ValueError: If a part does not fit the metadata.
        """
        parts = {"codes": codes, "scale": scale}
        if zero is not None:
            parts["zero"] = zero
        fmt = Format.of_integers(self.bits, self.group_size, self.symmetric)
        return PackedTensor(fmt, (self.rows, self.cols), parts)


@torch.library.custom_op("bitplan::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    rows: int,
    cols: int,
) -> Tensor:
    """``x @ W.T + bias``: x [..., cols], bias [rows] -> [..., rows], in the dtype of x."""
    weight = PackedMeta(bits, group_size, symmetric, rows, cols).packed(codes, scale, zero)
    if _compiled_kernels(codes):
        return CpuWeight(weight).linear(x, bias)
    return reference.linear(x, weight, bias)


@packed_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    rows: int,
    cols: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero, _, *meta = inputs
    ctx.save_for_backward(codes, scale, zero)
    ctx.meta = PackedMeta(*meta)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the packed weight is a constant."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(*ctx.saved_tensors, None, *ctx.meta).to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.flatten(0, -2).sum(0)
    return (grad_x, None, None, None, grad_bias, *(None for _ in ctx.meta))


packed_linear.register_autograd(_linear_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("bitplan::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    indices: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    rows: int,
    cols: int,
) -> Tensor:
    """All rows of W, or those with the given indices [n]: float32 [n, cols]."""
    weight = PackedMeta(bits, group_size, symmetric, rows, cols).packed(codes, scale, zero)
    if _compiled_kernels(codes):
        return CpuWeight(weight).unpack(indices)
    return reference.dequantize_rows(weight, indices)


@dequantize.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    indices: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    rows: int,
    cols: int,
) -> Tensor:
    count = rows if indices is None else indices.shape[0]
    return codes.new_empty(count, cols, dtype=torch.float32)


def _compiled_kernels(tensor: Tensor) -> bool:
    return kernel_for(tensor.device) == "cpu" and native.library() is not None

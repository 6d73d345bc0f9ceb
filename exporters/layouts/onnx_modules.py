"""Modules that become quantized nodes when ``torch.onnx`` exports them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.layers import conv_options, layer_kind, runs_own_code
from ...models.sites import places
from ...quantizers.format import Format
from ...quantizers.packed import PackedTensor, unpack_bits
from ..source import Source
from .packing import grid_of, to_matmul_nbits

MODULE, SHAPE, FORMAT = "bitplan.module", "bitplan.shape", "bitplan.format"  # of a node
NBITS = "com.microsoft::MatMulNBits"
INT_TYPES = {(4, True): "INT4", (4, False): "UINT4", (8, True): "INT8", (8, False): "UINT8"}


def dequantizes(fmt: Format, cols: int) -> bool:
    """Whether a dense weight [rows, cols] is one DequantizeLinear node; else it is unpacked.

    The operator has no 2-bit type that OpenVINO reads. An odd number of 4-bit zero points per row
    would be packed across rows there, unlike everywhere else.
    """
    odd = fmt.bits == 4 and not fmt.symmetric and fmt.group_size > 0 and fmt.groups(cols) % 2
    return fmt.bits in {4, 8} and not odd


class MatMulNBits(nn.Module):
    """Inputs [..., cols] times a weight in groups, as the operator of ONNX Runtime.

    ``accuracy_level`` 0 keeps the activations in float32; 4 would round them to 8 bits.
    """

    def __init__(self, name: str, packed: PackedTensor) -> None:
        super().__init__()
        self.fmt, self.shape = packed.fmt, packed.shape
        self.properties = _properties(name, packed)
        for part, tensor in to_matmul_nbits(packed).items():
            self.register_buffer(part, tensor.float() if part == "scales" else tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., cols] to outputs [..., rows]."""
        rows, cols = self.shape
        return torch.onnx.ops.symbolic(
            NBITS,
            [x, *self.buffers()],
            {
                "K": cols,
                "N": rows,
                "bits": self.fmt.bits,
                "block_size": self.fmt.group_size,
                "accuracy_level": 0,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], rows),
            version=1,
            metadata_props=self.properties,
        )


class Dequantized(nn.Module):
    """A dense weight as DequantizeLinear, which convolutions and whole-row scales need."""

    def __init__(self, name: str, packed: PackedTensor) -> None:
        super().__init__()
        fmt, cols = packed.fmt, packed.shape[1]
        self.shape, self.per_row = packed.shape, fmt.group_size <= 0
        size = cols if self.per_row else fmt.group_size
        scale, zero = grid_of(packed)
        codes = unpack_bits(packed.tensors["codes"], fmt.bits, cols)
        if fmt.symmetric:  # signed integers around 0 need no zero points
            codes = (codes.to(torch.int16) - int(fmt.zero_point)).to(torch.int8)
        # OpenVINO takes no short last group: it is filled up, and cut off again.
        codes = F.pad(codes, (0, fmt.groups(cols) * size - cols))
        self.attributes: dict[str, Any] = (
            {"axis": 0} if self.per_row else {"axis": 1, "block_size": size}
        )
        self.properties = _properties(name, packed) | {
            "bitplan.type": INT_TYPES[fmt.bits, fmt.symmetric]
        }
        self.register_buffer("codes", codes)
        self.register_buffer("scales", (scale[:, 0] if self.per_row else scale).float())
        if not fmt.symmetric:
            self.register_buffer("zero", (zero[:, 0] if self.per_row else zero).contiguous())

    def forward(self) -> Tensor:
        """The weight [rows, cols]."""
        codes = self.get_buffer("codes")
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            list(self.buffers()),
            self.attributes,
            dtype=torch.float32,
            shape=codes.shape,
            version=21,
            metadata_props=self.properties,
        )
        return weight if weight.shape[1] == self.shape[1] else weight[:, : self.shape[1]]


class Unpacked(nn.Module):
    """The weight of a convolution in the layout of MatMulNBits, unpacked by standard operators.

    Runtimes compute it once, when they load the graph. Not for linear layers: OpenVINO gets the
    product with such a weight wrong if whole rows share a scale.
    """

    def __init__(self, name: str, packed: PackedTensor) -> None:
        super().__init__()
        self.fmt, self.shape = packed.fmt, packed.shape
        self.properties = _properties(name, packed)
        for part, tensor in to_matmul_nbits(packed).items():
            self.register_buffer(part, tensor.float() if part == "scales" else tensor)
        count = 8 // self.fmt.bits
        shifts = torch.arange(count, dtype=torch.uint8) * self.fmt.bits
        self.register_buffer("shifts", shifts, persistent=False)

    def forward(self) -> Tensor:
        """The weight [rows, cols]."""
        rows, cols = self.shape
        zero: Tensor | float = self.fmt.zero_point
        if not self.fmt.symmetric:
            groups = self.fmt.groups(cols)
            zero = self._codes(self.get_buffer("zero_points"))[:, :groups, None]
        codes = self._codes(self.get_buffer("B"), self.properties)
        weight: Tensor = (codes - zero) * self.get_buffer("scales").unsqueeze(-1)
        return weight.reshape(rows, -1)[:, :cols]

    def _codes(self, packed: Tensor, properties: dict[str, str] | None = None) -> Tensor:
        """Bytes [..., n] to codes [..., n * 8 / b] as float32."""
        shifts = self.get_buffer("shifts")
        shape = (*packed.shape, len(shifts))
        codes = torch.onnx.ops.symbolic(
            "BitShift",
            [packed.unsqueeze(-1), shifts],
            {"direction": "RIGHT"},
            dtype=torch.uint8,
            shape=shape,
            version=11,
            metadata_props=properties,
        )
        low: Tensor = codes & (2**self.fmt.bits - 1)
        return low.flatten(-2).float()


class Float(nn.Module):
    """A dense weight that is not quantized."""

    def __init__(self, packed: PackedTensor) -> None:
        super().__init__()
        self.register_buffer("weight", packed.dequantize())

    def forward(self) -> Tensor:
        """The weight [rows, cols]."""
        return self.get_buffer("weight")


class QuantizedLinear(nn.Module):
    """Stands for ``nn.Linear`` and for the ``Conv1D`` of transformers.

    Args:
        name: The module's name.
        blocks: Its rows, a block of them in each format, in order: one where the whole matrix has
            one format, several where output channels have formats of their own.
        bias: Added to the outputs [rows].
    """

    def __init__(self, name: str, blocks: Sequence[PackedTensor], bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.blocks = nn.ModuleList(
            MatMulNBits(name, block) if block.fmt.group_size > 0 else dense_weight(name, block)
            for block in blocks
        )

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., cols] to outputs [..., rows]."""
        outputs = [
            block(x) if isinstance(block, MatMulNBits) else F.linear(x, block())
            for block in self.blocks
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if self.bias is None else y + self.bias


class QuantizedConv2d(nn.Module):
    """Stands for ``nn.Conv2d`` with zero padding."""

    def __init__(self, name: str, packed: PackedTensor, like: Any) -> None:
        super().__init__()
        self.kernel: tuple[int, ...]
        self.options: Any
        self.kernel, self.options = conv_options(like)
        self.dense, self.bias = dense_weight(name, packed), like.bias

    @property
    def weight(self) -> Tensor:
        """The kernels; vision models of transformers ask for their dtype."""
        dense: Tensor = self.dense()
        return dense.reshape(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, in, height, width] to [batch, out, height, width]."""
        weight = self.weight
        if isinstance(self.dense, Unpacked) and self.options[-1] > 1:
            # OpenVINO multiplies what normalizes the outputs of a convolution with groups into the
            # weights before this reshape, where they have another rank. A bound is in its way.
            weight = weight.clamp(min=-torch.finfo(torch.float32).max)
        result: Tensor = F.conv2d(x, weight, self.bias, *self.options)
        return result


def dense_weight(name: str, packed: PackedTensor) -> nn.Module:
    """A module without inputs that gives a weight [rows, cols]."""
    if packed.fmt.floating:
        return Float(packed)
    if dequantizes(packed.fmt, packed.shape[1]):
        return Dequantized(name, packed)
    return Unpacked(name, packed)


def quantized_copy(source: Source) -> nn.Module:
    """The model with its planned matrices replaced; everything else is shared with it.

    Raises:
        ValueError: If the plan quantizes an embedding.
    """
    model = source.model.module
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    modules = dict(result.named_modules(remove_duplicate=False))
    parameters = {place.name: place for place in places(result)}
    names = {unit.name: (unit.name, *unit.aliases) for unit in source.units}
    for owner, packed in source.each("Packing"):
        for name in names[owner]:
            place = parameters.get(name)
            plain = name in modules and _has_form(modules[name])
            if place is not None and not plain and packed.fmt.floating:
                dense = place.restored(packed.dequantize()).contiguous()
                place.module._parameters[place.attribute] = nn.Parameter(dense, False)
                continue
            replacement = _replacement(name, packed, modules.get(name))
            if replacement is not None:
                parent, _, child = name.rpartition(".")
                setattr(result.get_submodule(parent), child, replacement)
    return result.eval()


def _has_form(module: nn.Module) -> bool:
    """Whether a module has a counterpart with a quantized weight."""
    return layer_kind(module) != "other" and not runs_own_code(module)


def _replacement(name: str, packed: PackedTensor, module: nn.Module | None) -> nn.Module | None:
    kind = layer_kind(module)
    if module is None or not _has_form(module):
        what = "a parameter" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"{name} is {what}, for which the ONNX export has no quantized form. Leave it out of "
            f"the plan (--exclude '{name}')."
        )
    if kind == "embedding":
        if packed.fmt.integer:
            raise ValueError(
                f"{name} is an embedding, which is looked up and not multiplied, so it cannot be "
                f"{packed.fmt}. Leave it out of the plan (--exclude '{name}')."
            )
        embedding: nn.Module = nn.Embedding.from_pretrained(packed.dequantize())
        return embedding
    if kind == "convolution":
        return QuantizedConv2d(name, packed, module)
    bias: Any = getattr(module, "bias", None)
    return QuantizedLinear(name, [packed], bias)


def _properties(name: str, packed: PackedTensor) -> dict[str, str]:
    rows, cols = packed.shape
    return {MODULE: name, SHAPE: f"{rows},{cols}", FORMAT: packed.fmt.name}

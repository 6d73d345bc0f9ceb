"""From an ONNX graph back to packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...quantizers.format import PER_CHANNEL, Format
from ...quantizers.packed import PackedTensor
from .onnx_modules import FORMAT, MODULE, SHAPE
from .packing import from_matmul_nbits, packed_from

if TYPE_CHECKING:
    import onnx_ir as ir

Found = tuple[Format, int, Callable[[], PackedTensor]]  # format, bytes, and what reads the weight


def quantized_nodes(model: ir.Model) -> Iterator[tuple[str, tuple[int, int], ir.Node]]:
    """Module, shape [rows, cols] and node of every quantized matrix, tied ones once."""
    seen: set[str] = set()
    for node in model.graph:
        name = node.metadata_props.get(MODULE)
        if name is not None:
            rows, cols = map(int, node.metadata_props[SHAPE].split(","))
            shape = rows, cols
        elif node.op_type == "MatMulNBits":  # another tool's
            weights = node.inputs[1]
            name = str(weights.name).removesuffix("_Q4").removesuffix(".weight") if weights else ""
            shape = node.attributes["N"].as_int(), node.attributes["K"].as_int()
        else:
            continue
        if name not in seen:
            yield name, shape, node
        seen.add(name)


def read_node(node: ir.Node, shape: tuple[int, int]) -> Found:
    """The format of a quantized matrix, the bytes of its tensors, and a function that reads it."""
    if node.op_type == "MatMulNBits":
        return _read_nbits(node, shape)
    if node.op_type == "DequantizeLinear":
        return _read_dequantized(node, shape)
    return _read_unpacked(node, shape)


def _read_nbits(node: ir.Node, shape: tuple[int, int]) -> Found:
    stored = [_stored(value) for value in node.inputs[1:4]]
    names = ("B", "scales", "zero_points")
    bits, size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    return _nbits(
        dict(zip(names, stored, strict=False)),
        Format.of_integers(bits, size, len(stored) < 3),
        shape,
    )


def _nbits(parts: Mapping[str, Any], fmt: Format, shape: tuple[int, int]) -> Found:
    nbytes = sum(part.nbytes for part in parts.values())

    def read() -> PackedTensor:
        tensors = {name: _tensor(part) for name, part in parts.items()}
        rows, groups = shape[0], fmt.groups(shape[1])
        tensors["scales"] = tensors["scales"].half().view(rows, groups)
        if "zero_points" in tensors:
            tensors["zero_points"] = tensors["zero_points"].view(rows, -1)
        return from_matmul_nbits(tensors, fmt, shape[1])

    return fmt, nbytes, read


def _read_dequantized(node: ir.Node, shape: tuple[int, int]) -> Found:
    parts = [_stored(value) for value in node.inputs]
    codes = parts[0]
    block = node.attributes.get("block_size")
    size = block.as_int() if block else PER_CHANNEL
    symmetric = codes.dtype.name.startswith("INT")
    bits = 4 if codes.dtype.name.endswith("4") else 8
    fmt = Format.of_integers(bits, size, symmetric)

    def read() -> PackedTensor:
        numbers = _tensor(codes).short()[:, : shape[1]]
        unsigned = (numbers + (int(fmt.zero_point) if symmetric else 0)).to(torch.uint8)
        groups = fmt.groups(shape[1])
        scale = _tensor(parts[1]).half().view(shape[0], groups)
        zero = None
        if not symmetric:
            zero = _tensor(parts[2]).view(shape[0], groups)
        return packed_from(unsigned, scale, zero, fmt)

    return fmt, sum(part.nbytes for part in parts), read


def _read_unpacked(node: ir.Node, shape: tuple[int, int]) -> Found:
    """Follow a weight from its packed bytes: to the difference to zero, the product with scales."""
    fmt = Format.parse(node.metadata_props[FORMAT])
    parts, value = {"B": _stored(node.inputs[0])}, node.outputs[0]
    while "scales" not in parts:
        following = value.uses()[0].node
        if following.op_type == "Mul":
            parts["scales"] = _stored(following.inputs[1])
        elif following.op_type == "Sub" and not fmt.symmetric:
            parts["zero_points"] = _stored(following.inputs[1])
        value = following.outputs[0]
    return _nbits(parts, fmt, shape)


def _stored(value: ir.Value | None) -> Any:
    """The tensor that an input of a node comes from."""
    assert value is not None
    while value.const_value is None:
        producer = value.producer()
        upstream = producer.inputs[0] if producer else None
        if upstream is None:
            raise ValueError(f"{value.name!r} is computed from the inputs: it is no stored weight.")
        value = upstream
    return value.const_value


def _tensor(stored: Any) -> Tensor:
    """A copy of a stored tensor; 4-bit integers as bytes."""
    array = stored.numpy()
    if array.dtype.itemsize == 1:
        array = array.astype("int8" if stored.dtype.name.startswith("INT") else "uint8")
    return torch.from_numpy(array.copy())

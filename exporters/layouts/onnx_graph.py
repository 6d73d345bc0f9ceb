"""From a module to an ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...models.workload import Batch, LoadedModel, samples_in
from ...quantizers.packed import pack_bits

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21  # the first with 4-bit integers and blocks in DequantizeLinear
LEAST = 1024  # bytes from which a tensor is worth a Cast
HALVES = (torch.float16, torch.bfloat16)


def build(model: LoadedModel, module: nn.Module) -> ir.Model:
    """Export a module, batch size and text length left open.

    Args:
        model: How the module is fed and read.
        module: The module to export, in place of ``model.module``.

    Returns:
        The graph: integers in their own types, float32 tensors as half precision where that holds
        them exactly.

    Raises:
        ValueError: If ``torch.onnx`` cannot export the module.
    """
    from onnxscript.optimizer import optimize_ir

    wrapped = _Wrapped(model, module)
    names, tensors, axes = _example(model)
    wrapped.names = names if isinstance(_first_batch(model), Mapping) else None
    dims = {axis: torch.export.Dim(axis) for axis in ("batch", "length")}
    shapes = tuple({i: dims[axis] for i, axis in enumerate(axes)} for _ in tensors)
    with _quiet():
        try:
            program = torch.onnx.export(
                wrapped,
                tuple(tensors),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(shapes,),
                input_names=names,
                output_names=["logits"],
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            why = error.__cause__ or error
            raise ValueError(
                f"torch.onnx cannot export {model.id}: {type(why).__name__}: "
                f"{(str(why) or str(error)).splitlines()[0]}"
            ) from error
        assert program is not None
        graph: ir.Model = program.model
        optimize_ir(graph, should_fold=lambda node: False if _reads_weights(node) else None)
    _set_integer_types(graph)
    _halve(graph)
    _forget_origin(graph)
    return graph


class _Wrapped(nn.Module):
    """The model as a function of tensors that returns logits."""

    def __init__(self, model: LoadedModel, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names: list[str] | None = None
        self._fed = replace(model, module=module)

    def forward(self, *tensors: Tensor) -> Tensor:
        batch: Batch = tensors[0] if len(tensors) == 1 else tensors
        if self.names is not None:
            batch = dict(zip(self.names, tensors, strict=True))
        logits: Tensor = self._fed.unchecked_logits(batch)
        return logits


def _first_batch(model: LoadedModel) -> Batch:
    if model.is_language_model:
        return torch.zeros(2, 16, dtype=torch.int64)
    if not model.workload.calibration:
        raise ValueError(
            f"{model.id} comes without batches, so nothing says what its inputs look like. Give "
            "its Workload calibration batches."
        )
    return model.workload.calibration[0]


def _example(model: LoadedModel) -> tuple[list[str], list[Tensor], tuple[str, ...]]:
    """Names of the inputs, two samples of each, and the dimensions left open."""
    batch = _first_batch(model)
    if model.is_language_model:
        assert isinstance(batch, Tensor)
        return ["input_ids"], [batch], ("batch", "length")
    if isinstance(batch, Mapping):
        parts = dict(batch)
    elif isinstance(batch, Tensor):
        parts = {"input": batch}
    else:
        parts = {f"input_{i}": value for i, value in enumerate(batch)}
    if not all(isinstance(value, Tensor) for value in parts.values()):
        raise ValueError(f"The inputs of {model.id} are not all tensors, as those of a graph are.")
    if samples_in(batch) < 2:  # torch.export takes a dimension of 1 for fixed
        parts = {name: torch.cat([value, value]) for name, value in parts.items()}
    return list(parts), list(parts.values()), ("batch",)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, which are about other things than ours."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _reads_weights(node: ir.Node) -> bool:
    """Whether a node starts from a stored parameter: those stay as they are stored."""
    return any(
        value is not None and value.is_initializer() and "." in (value.name or "")
        for value in node.inputs
    )


def _forget_origin(model: ir.Model) -> None:
    """Drop the stack traces that the exporter keeps: they are larger than the graph."""
    for thing in (model, model.graph, *model.graph, *model.graph.inputs, *model.graph.outputs):
        for key in [key for key in thing.metadata_props if not key.startswith("bitplan.")]:
            del thing.metadata_props[key]
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _set_integer_types(model: ir.Model) -> None:
    """Give the codes and zero points of DequantizeLinear nodes the type their properties name."""
    import onnx_ir as ir

    for node in model.graph:
        kind = node.metadata_props.get("bitplan.type", "")
        if not kind.endswith("INT4"):
            continue
        dtype = ir.DataType[kind]
        for value in (node.inputs[0], *node.inputs[2:]):
            assert value is not None and value.const_value is not None
            if value.dtype == dtype:  # shared with a node before
                continue
            numbers = torch.from_numpy(value.const_value.numpy())
            stream = pack_bits((numbers.to(torch.uint8) & 15).reshape(1, -1), 4)[0].numpy()
            shape = ir.Shape(tuple(numbers.shape))
            value.const_value = ir.PackedTensor(stream, dtype, shape=shape, name=value.name)
            value.dtype = dtype


def _halve(model: ir.Model) -> None:
    """Store float32 tensors that half precision holds exactly in half precision, with a Cast."""
    import onnx_ir as ir

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.dtype != ir.DataType.FLOAT:
            continue
        if tensor.nbytes < LEAST and not name.endswith(".scales"):
            continue
        full = torch.from_numpy(tensor.numpy())
        found = next(
            (half for half in map(full.to, HALVES) if torch.equal(half.float(), full)), None
        )
        if found is None:
            continue
        kind = ir.DataType.FLOAT16 if found.dtype == torch.float16 else ir.DataType.BFLOAT16
        array = found.view(torch.int16).numpy().view(kind.numpy())
        stored = ir.Value(
            name=f"{name}.half",
            shape=value.shape,
            type=ir.TensorType(kind),
            const_value=ir.Tensor(array, dtype=kind, name=f"{name}.half"),
        )
        graph.initializers.pop(name)
        value.const_value = None
        attribute = ir.AttrInt64("to", ir.DataType.FLOAT)
        graph.insert_before(graph[0], ir.Node("", "Cast", [stored], [attribute], outputs=[value]))
        graph.register_initializer(stored)

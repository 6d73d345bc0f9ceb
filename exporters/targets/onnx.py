"""ONNX graphs with quantized weights, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ...jobs.materialize import save_hugging_face_files
from ...models.measure import Run
from ...models.workload import Batch, LoadedModel
from ..layouts.onnx_modules import quantized_copy
from ..source import Source
from . import EXPORTERS, Exporter, Stored

FILE = "model.onnx"
LARGEST = 1 << 30  # bytes of weights kept in the graph's own file; protobuf ends at 2 GiB


@EXPORTERS.register("onnx")
class Onnx(Exporter):
    """Any module for ONNX Runtime.

    Linear layers become ``MatMulNBits``; convolutions, and linear layers with one scale per row,
    ``DequantizeLinear``. What half precision holds exactly is stored so.
    """

    runtimes = ("onnx",)
    extra: ClassVar[str | None] = "onnx"
    module: ClassVar[str | None] = "onnxruntime"
    form: ClassVar[Literal["folder", "file"] | None] = "folder"
    needs = ("onnx", "onnxscript")
    noise = "float32 rounding of the logits"
    max_kl = 1e-6

    def usage(self, path: Path, source: Source) -> str:
        """How ONNX Runtime reads it without rounding activations."""
        option = "session.qdq_matmulnbits_accuracy_level"
        return (
            f"onnxruntime.InferenceSession('{path / FILE}', options), with {option} = 0 to keep "
            "activations as they are"
        )

    def write(self, source: Source, out: Path) -> None:
        """Trace the model with its matrices replaced, batch and text length left open."""
        import onnx_ir

        from ..layouts.onnx_graph import build

        graph = build(source.model, quantized_copy(source))
        values = (value.const_value for value in graph.graph.initializers.values())
        size = sum(tensor.nbytes for tensor in values if tensor is not None)
        beside = f"{FILE}.data" if size > LARGEST else None
        onnx_ir.save(graph, out / FILE, external_data=beside)
        save_hugging_face_files(source.model, out)

    def recognizes(self, path: Path) -> bool:
        """An .onnx file, or a folder with a model.onnx."""
        return path.suffix == ".onnx" or (path / FILE).is_file()

    def read(self, path: Path, model: LoadedModel | None = None) -> Iterator[Stored]:
        """The quantized matrices of a graph.

        Raises:
            ValueError: If the packages to read it are missing, or it is damaged.
        """
        try:
            import onnx_ir
        except ImportError as error:
            raise ValueError(
                f"Reading {path} takes the extra: pip install 'bitplan[onnx]'."
            ) from error

        from ..layouts.onnx_reader import quantized_nodes, read_node

        file = path if path.is_file() else path / FILE
        try:
            graph = onnx_ir.load(file)
        except Exception as error:  # whatever protobuf finds wrong
            raise ValueError(
                f"{file} is no ONNX graph ({error}). Write or copy it again."
            ) from error
        for name, shape, node in quantized_nodes(graph):
            fmt, nbytes, packed = read_node(node, shape)

            def weight(packed: Any = packed) -> Tensor:
                dense: Tensor = packed().dequantize()
                return dense

            yield Stored(name, shape, fmt, nbytes, weight)

    def logits(self, path: Path) -> Run:
        """Load it with ONNX Runtime on the CPU, activations left in float32."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # By default it would round activations to 8 bits where it turns a DequantizeLinear and a
        # product into one operator.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        session = onnxruntime.InferenceSession(
            path / FILE, options, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in session.get_inputs()]

        def run(batch: Batch) -> Tensor:
            (logits,) = session.run(["logits"], feed(names, batch))
            return as_logits(logits)

        return run


def feed(names: list[str], batch: Batch) -> dict[str, Any]:
    """A batch as arrays by the names of a graph's inputs."""
    if isinstance(batch, Tensor):
        values: list[Any] = [batch]
    else:
        values = list(batch.values() if isinstance(batch, Mapping) else batch)
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def as_logits(array: Any) -> Tensor:
    """Outputs [samples, ..., classes] as logits [samples, positions, classes]."""
    logits = torch.from_numpy(np.array(array, dtype=np.float32))
    return logits.reshape(logits.shape[0], -1, logits.shape[-1])

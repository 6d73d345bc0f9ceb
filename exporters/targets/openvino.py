"""ONNX graphs run in OpenVINO."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...models.measure import Run
from ...models.workload import Batch
from ..source import Source
from . import EXPORTERS, Exporter
from .onnx import FILE, Onnx, as_logits, feed


@EXPORTERS.register("openvino")
class OpenVino(Onnx):
    """The same graphs, run in OpenVINO."""

    layout = "onnx"
    extra = "openvino"
    module = "openvino"

    recognizes = Exporter.recognizes  # the files are those of ``onnx``

    def usage(self, path: Path, source: Source) -> str:
        """How OpenVINO reads it without rounding activations."""
        return (
            f"openvino.Core().compile_model('{path / FILE}', 'CPU', options), with "
            "DYNAMIC_QUANTIZATION_GROUP_SIZE = 0 to keep activations as they are"
        )

    def logits(self, path: Path) -> Run:
        """Load it with OpenVINO on the CPU, activations left in float32."""
        import openvino

        core = openvino.Core()
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        compiled = core.compile_model(core.read_model(path / FILE), "CPU", exact)
        names = [port.get_any_name() for port in compiled.inputs]

        def run(batch: Batch) -> Tensor:
            return as_logits(compiled(feed(names, batch))["logits"])

        return run

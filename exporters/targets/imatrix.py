"""Importance matrices for llama-quantize, from the calibration text of the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...models.find import find_matrices
from ...models.mixture import recorded_shares
from ...models.packed_modules import PackedModule
from ...models.rendering import Renderer
from ...models.samples import calibration_samples
from ...sensitivity.metrics import Task
from ...sensitivity.metrics._input_moments import input_moments
from ..source import Source
from . import EXPORTERS, Exporter

SEQUENCES, LENGTH = 96, 128  # where a plan does not say what it was calibrated on


@EXPORTERS.register("imatrix")
class Imatrix(Exporter):
    """An importance matrix for llama-quantize."""

    form = "file"
    suffix = ".gguf"
    weights = False

    def write(self, source: Source, out: Path) -> None:
        """Run the original model on the calibration text; the embedding and the head are left out.

        The file holds, per tensor, the sum of squares of every input channel (``in_sum2``) and
        the number of tokens (``counts``), as ``llama-imatrix`` writes them.

        Raises:
            ValueError: If the source is a packed folder.
        """
        import gguf

        from ...models.gguf_names import gguf_tensors
        from ..layouts.gguf import architecture_of

        model, said = source.model, source.plan.calibration
        if any(isinstance(module, PackedModule) for module in model.module.modules()):
            raise ValueError(
                "An importance matrix is of the original model, which a packed folder no longer "
                "holds. Give the plan.json in it, or the run."
            )
        samples = calibration_samples(
            model,
            recorded_shares(said),
            said.get("sequences", SEQUENCES),
            said.get("length", LENGTH),
            said.get("seed", 0),
        )
        units = find_matrices(model.module)  # whole ones, whatever parts the plan has
        names = gguf_tensors(*architecture_of(model), [unit.name for unit in units])
        with source.reporter.bar("Reading inputs", samples.count) as advance:
            task = Task(model, units, (), Renderer(model.module, units), samples, 0, advance)
            moments, positions, _ = input_moments(task, lambda x: x.square().sum(0), "imatrix")
        if source.folds:  # of the inputs as they were before, which llama-quantize has
            folds = source.folds()
            moments = {
                key: moment * folds.column_scale(key[0], len(moment)).to(moment).square()
                for key, moment in moments.items()
            }
        writer = gguf.GGUFWriter(out, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [samples.source])
        writer.add_uint32("imatrix.chunk_count", samples.count)
        writer.add_uint32("imatrix.chunk_size", samples.length or 1)
        for (name, site), moment in moments.items():
            if site == "linear" and name in names and name not in source.aliases.values():
                writer.add_tensor(f"{names[name]}.in_sum2", moment.float().cpu().numpy())
                counts = np.full((len(moment), 1), positions, np.float32)
                writer.add_tensor(f"{names[name]}.counts", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def usage(self, path: Path, source: Source) -> str:
        """How llama-quantize reads it."""
        return (
            f"llama-quantize --imatrix {path} --pure --tensor-type-file TYPES.txt MODEL-F16.gguf "
            "MODEL.gguf q8_0  (TYPES.txt: --to gguf --plan-only)"
        )

"""The plan as plain data for other programs."""

from __future__ import annotations

import json
from typing import Any

from ...quantizers.runtimes import byte_count
from ..source import Source
from . import EXPORTERS, Exporter


@EXPORTERS.register("json")
class Json(Exporter):
    """Plain data, one object per matrix."""

    config_suffix = ".json"

    def config(self, source: Source) -> str:
        """One object per module, and per part of a module whose rows have several formats."""
        plan, shapes = source.plan, source.shapes
        count = byte_count(plan.runtime)
        modules: dict[str, dict[str, Any]] = {}
        for name, fmt in source.formats.items():
            entry: dict[str, Any] = {"format": fmt.name, "bits": fmt.bits, "shape": shapes[name]}
            if fmt.layout == "codes":
                entry |= {"group_size": fmt.group_size or shapes[name][1], "sym": fmt.symmetric}
            if name in plan.row_sets:  # some rows of a matrix: half-open ranges, ascending
                entry |= {"matrix": plan.row_sets[name].module, "rows": plan.row_sets[name].rows}
            modules[name] = entry | {"bytes": count(fmt, shapes[name])}
        data = {
            "model": plan.model.model_dump(),
            "bytes": plan.bytes,
            "bits_per_weight": plan.bpw,
            "tied": source.aliases,
            "modules": modules,
        }
        return json.dumps(data, indent=1) + "\n"

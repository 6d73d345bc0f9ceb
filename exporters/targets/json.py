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
        """One object per module."""
        plan, shapes = source.plan, source.shapes
        count = byte_count(plan.runtime)
        modules: dict[str, dict[str, Any]] = {}
        for name, fmt in source.formats.items():
            entry: dict[str, Any] = {"format": fmt.name, "bits": fmt.bits, "shape": shapes[name]}
            if fmt.layout == "codes":
                entry |= {"group_size": fmt.group_size or shapes[name][1], "sym": fmt.symmetric}
            modules[name] = entry | {"bytes": count(fmt, shapes[name])}
        data = {
            "model": plan.model.model_dump(),
            "bytes": plan.bytes,
            "bits_per_weight": plan.bpw,
            "tied": source.aliases,
            "modules": modules,
        }
        return json.dumps(data, indent=1) + "\n"

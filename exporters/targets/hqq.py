"""Per-layer configurations of HQQ."""

from __future__ import annotations

import json
from pathlib import Path

from ..source import Source
from . import EXPORTERS, Exporter


@EXPORTERS.register("hqq")
class Hqq(Exporter):
    """Arguments of HQQ's BaseQuantizeConfig."""

    runtimes = ("hqq",)
    config_suffix = ".json"

    def config(self, source: Source) -> str:
        """One object per module: ``nbits``, ``group_size`` (null for whole rows), ``axis``."""
        layers = {
            name: {
                "nbits": fmt.bits,
                "group_size": fmt.group_size if fmt.group_size > 0 else None,
                "axis": 1,
            }
            for name, fmt in source.formats.items()
            if fmt.integer
        }
        return json.dumps(layers, indent=1) + "\n"

    def usage(self, path: Path, source: Source) -> str:
        """How HQQ reads it."""
        return (
            f"HQQLinear(model.get_submodule(name), BaseQuantizeConfig(**entry)) for every name and "
            f"entry in {path}"
        )

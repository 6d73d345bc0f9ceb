"""Passes of NNCF's weight compression."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...quantizers.format import Format
from ..source import Source
from . import EXPORTERS, Exporter


@EXPORTERS.register("nncf")
class Nncf(Exporter):
    """Passes of NNCF's compress_weights."""

    runtimes = ("nncf",)
    config_suffix = ".json"

    def config(self, source: Source) -> str:
        """A list of passes; every pass ignores the modules of all others."""
        formats = source.formats
        kinds = dict.fromkeys(f for f in formats.values() if f.integer)
        names = [unit.name for unit in source.everything]
        passes = []
        for fmt in kinds:
            others = [name for name in names if formats.get(name) != fmt]
            passes.append(_pass(fmt, others))
        return json.dumps(passes, indent=1) + "\n"

    def usage(self, path: Path, source: Source) -> str:
        """How NNCF reads it."""
        return (
            "nncf.compress_weights(model, mode=nncf.CompressWeightsMode(p['mode']), ratio=1.0, "
            "all_layers=True, group_size=p['group_size'], ignored_scope=nncf.IgnoredScope("
            f"patterns=p['ignored_patterns'], validate=False)) for every p in {path}"
        )


def _pass(fmt: Format, ignored: list[str]) -> dict[str, Any]:
    zero_point = "sym" if fmt.symmetric else "asym"
    return {
        "mode": f"int{fmt.bits}_{zero_point}",
        "group_size": fmt.group_size if fmt.group_size > 0 else -1,
        # A node is called after its module, with more around it, in every framework of NNCF.
        "ignored_patterns": [rf".*(^|[./]){_module_pattern(name)}([./].*|$)" for name in ignored],
    }


def _module_pattern(name: str) -> str:
    """Dots may be slashes: torch nodes are ``a/b/linear``, OpenVINO ones ``__module.a.b/...``."""
    return "[./]".join(re.escape(part) for part in name.split("."))

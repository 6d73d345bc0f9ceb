"""What NVIDIA ModelOpt writes beside a mixed-precision checkpoint."""

from __future__ import annotations

import json
from typing import Any

from ...quantizers.format import Format
from ..source import Source
from . import EXPORTERS, Exporter


@EXPORTERS.register("modelopt")
class ModelOpt(Exporter):
    """ModelOpt's hf_quant_config.json."""

    runtimes = ("modelopt",)
    config_suffix = ".json"

    def config(self, source: Source) -> str:
        """Algorithm and group size by module, and the modules that are left out."""
        formats = source.formats
        layers = {name: _entry(fmt) for name, fmt in formats.items() if fmt.integer}
        data = {
            "producer": {"name": "bitplan", "version": source.plan.versions.get("bitplan", "")},
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "kv_cache_quant_algo": None,
                "quantized_layers": layers,
                "exclude_modules": [u.name for u in source.everything if u.name not in layers],
            },
        }
        return json.dumps(data, indent=1) + "\n"


def _entry(fmt: Format) -> dict[str, Any]:
    if fmt.bits == 8:
        return {"quant_algo": "W8A16"}
    return {
        "quant_algo": "W4A16_AWQ",
        "group_size": fmt.group_size,
        "has_zero_point": False,
        "pre_quant_scale": False,
    }

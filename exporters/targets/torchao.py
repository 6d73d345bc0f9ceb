"""The configuration of torchao that quantizes every module in its own width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...models.layers import layer_kind
from ...quantizers.format import Format
from ..source import Source
from . import EXPORTERS, Exporter


@EXPORTERS.register("torchao")
class TorchAO(Exporter):
    """FqnToConfig of torchao."""

    runtimes = ("torchao",)
    config_suffix = ".json"

    def config(self, source: Source) -> str:
        """What ``torchao.core.config.config_from_dict`` reads: exact names only.

        transformers sorts the keys of the configurations it saves, so patterns, of which the first
        match counts, would not survive it.
        """
        formats = source.formats
        modules = {
            unit.name: _entry(formats.get(unit.name))
            for unit in source.everything
            if not _is_embedding(source, unit.name)
        }
        data = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": modules}}
        return json.dumps(data, indent=1) + "\n"

    def usage(self, path: Path, source: Source) -> str:
        """How torchao reads it."""
        return (
            "torchao.quantization.quantize_(model, "
            f"torchao.core.config.config_from_dict(json.load(open({str(path)!r}))), filter_fn=None)"
        )


def _entry(fmt: Format | None) -> dict[str, Any] | None:
    """The configuration of one module; None leaves it as it is."""
    if fmt is None or fmt.floating:
        return None
    return {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {
            "weight_dtype": {"_type": "torch.dtype", "_data": f"int{fmt.bits}"},
            "granularity": {
                "_type": "PerGroup",
                "_version": 1,
                "_data": {"group_size": fmt.group_size},
            },
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        },
    }


def _is_embedding(source: Source, name: str) -> bool:
    modules = dict(source.model.module.named_modules())
    return layer_kind(modules.get(name)) == "embedding"

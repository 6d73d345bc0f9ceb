"""Checkpoints of AutoRound, which transformers loads with the auto-round package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...models.measure import Run
from ...models.workload import LoadedModel
from ...quantizers.format import Format
from ...quantizers.packed import PackedTensor
from ..configs import gptq
from ..configs.folder import (
    TensorFiles,
    linear_names,
    method_of,
    read_config,
    transformers_logits,
    write_folder,
)
from ..configs.own_names import OwnNames
from ..layouts.packing import to_gptq
from ..source import Source
from . import EXPORTERS, Exporter, Stored

V1, V2 = "auto_round:auto_gptq", "auto_round"  # zero points as z - 1, and as z


@EXPORTERS.register("autoround")
class AutoRound(Exporter):
    """For transformers with auto-round.

    Without an asymmetric format it has the widely read ``auto_round:auto_gptq`` packing; that
    one stores z - 1, so plans with an asymmetric format get the packing ``auto_round``.
    """

    runtimes = ("autoround",)
    extra = "autoround"
    module = "auto_round"
    form: ClassVar[Literal["folder", "file"] | None] = "folder"
    config_suffix = ".json"
    noise = "the runtime computes in float16"
    max_kl = 1e-4

    def usage(self, path: Path, source: Source) -> str:
        """How transformers reads the folder, and AutoRound the configuration."""
        if path.suffix == ".json":
            return f"AutoRound(model, tokenizer, layer_config=json.load(open({str(path)!r})))"
        return f"AutoModelForCausalLM.from_pretrained({str(path)!r}), with auto-round installed"

    def config(self, source: Source) -> str:
        """The ``layer_config`` that AutoRound itself takes."""
        linear_names(source)
        layers = {name: _entry(fmt) for name, fmt in source.formats.items()}
        return json.dumps(layers, indent=1) + "\n"

    def write(self, source: Source, out: Path) -> None:
        """Write the layout of GPTQ with an entry in ``extra_config`` for every linear layer."""
        packing = _packing_format(source)

        def pack(packed: PackedTensor) -> dict[str, Tensor]:
            tensors = to_gptq(packed, offset_zeros=packing == V1)
            del tensors["g_idx"]  # only GPTQ's own readers want the group of every column
            return tensors

        write_folder(source, out, pack, {"quantization_config": _config(source, packing)})

    def recognizes(self, path: Path) -> bool:
        """A folder whose quantization_config says so."""
        return method_of(path) in {"auto-round", "intel/auto-round"}

    def read(self, path: Path, model: LoadedModel | None = None) -> Iterator[Stored]:
        """The packed matrices of a folder.

        Raises:
            ValueError: If the packing is another one, or a matrix has no format of ours.
        """
        config = read_config(path)["quantization_config"]
        packing = config.get("packing_format", V1)
        if packing not in {V1, V2}:
            raise ValueError(f"{path} has the packing {packing!r}; bitplan reads {V1} and {V2}.")
        extra = _extra_config(config, TensorFiles(path))
        formats = gptq.read_formats(path, config, lambda name: extra.get(name, {}))
        yield from gptq.read_layers(path, formats, offset_zeros=packing == V1)

    def logits(self, path: Path) -> Run:
        """Load it with transformers, in float16: the kernels of auto-round know no other."""
        import auto_round  # noqa: F401  # a clear error where it is missing
        import torch

        return transformers_logits(path, torch.float16)


def _extra_config(config: Mapping[str, Any], files: TensorFiles) -> dict[str, Mapping[str, Any]]:
    """What the configuration says of every packed module in particular, as AutoRound reads it.

    A key that names no module is a regular expression that is searched for in names. A module's
    own entry counts before all of them, then the first that matches; one without settings, or that
    is no valid expression, counts nothing. Expressions speak for modules outside the blocks, such
    as the output head, only if they match none inside.
    """
    extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config") or {}
    blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names") or ""
    starts = tuple(blocks.split(",") if isinstance(blocks, str) else blocks)
    names = list(files.modules_with("qweight"))
    found = {name: extra[name] for name in names if name in extra}
    for key, entry in extra.items():
        if not entry or f"{key}.qweight" in files or f"{key}.weight" in files:
            continue
        try:
            matching = [name for name in names if re.search(key, name)]
        except re.error:
            continue
        inside = [name for name in matching if name.startswith(starts)]
        for name in inside or matching:
            found.setdefault(name, entry)
    return found


def _packing_format(source: Source) -> str:
    return V1 if all(fmt.symmetric for fmt in source.formats.values()) else V2


def _entry(fmt: Format) -> dict[str, Any]:
    if fmt.floating:
        return {"bits": 32 if fmt.name == "fp32" else 16, "data_type": "float"}
    return {
        "bits": fmt.bits,
        "group_size": gptq.group_size(fmt),
        "sym": fmt.symmetric,
        "data_type": "int",
    }


def _config(source: Source, packing: str) -> dict[str, Any]:
    usual, formats, own = gptq.most_used(source), source.formats, OwnNames(source.model)
    left = {"bits": 16, "data_type": "float"}
    extra: dict[str, Any] = {}
    for name in linear_names(source):
        fmt = formats.get(name)
        if fmt != usual:
            entry = left if fmt is None or fmt.floating else _entry(fmt)
            extra |= dict.fromkeys(own.spellings(name), entry)
    quantized = [own.module(name) for name, fmt in formats.items() if fmt.integer]
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        **_entry(usual),
        "block_name_to_quantize": _common_parent(quantized),
        "extra_config": extra,
    }


def _common_parent(names: list[str]) -> str:
    """The module that all of these are in: ``model.layers``."""
    parents = [name.split(".")[:-1] for name in names]
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))
    return ".".join(level[0] for level in levels)

"""GPTQ checkpoints with a ``dynamic`` section, which GPTQModel loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...models.measure import Run
from ...models.workload import LoadedModel
from ...quantizers.format import Format
from ..configs import gptq
from ..configs.folder import linear_names, method_of, read_config, write_folder
from ..configs.own_names import OwnNames
from ..layouts.packing import to_gptq
from ..source import Source
from . import EXPORTERS, Exporter, Stored

V1, V2 = "gptq", "gptq_v2"  # zero points as z - 1, and as z


@EXPORTERS.register("gptq")
class Gptq(Exporter):
    """For GPTQModel.

    Without an asymmetric format it is version 1 of the format; that one stores z - 1, so plans
    with an asymmetric format are version 2.
    """

    runtimes = ("gptq",)
    extra = "gptq"
    module = "gptqmodel"
    form: ClassVar[Literal["folder", "file"] | None] = "folder"
    config_suffix = ".json"
    noise = "the runtime computes in float16"
    max_kl = 1e-4

    def usage(self, path: Path, source: Source) -> str:
        """How GPTQModel reads the folder, and the configuration."""
        if path.suffix == ".json":
            return f"QuantizeConfig(**json.load(open({str(path)!r})))"
        return f"GPTQModel.load({str(path)!r}); transformers does not read 'dynamic'"

    def config(self, source: Source) -> str:
        """The quantization configuration that GPTQModel itself takes."""
        return json.dumps(_config(source), indent=1) + "\n"

    def write(self, source: Source, out: Path) -> None:
        """Write the weights, and the configuration into both files that readers look at."""
        config = _config(source)
        pack = partial(to_gptq, offset_zeros=config["checkpoint_format"] == V1)
        write_folder(source, out, pack, {"quantization_config": config})
        (out / "quantize_config.json").write_text(json.dumps(config, indent=1) + "\n")

    def recognizes(self, path: Path) -> bool:
        """A folder whose quantization_config says so."""
        return method_of(path) == "gptq"

    def read(self, path: Path, model: LoadedModel | None = None) -> Iterator[Stored]:
        """The packed matrices of a folder.

        Raises:
            ValueError: If its packing is another one, or a matrix has no format of ours.
        """
        config = read_config(path)["quantization_config"]
        version = config.get("checkpoint_format", V1)
        if version not in {V1, V2}:
            raise ValueError(f"{path} has the packing {version!r}; bitplan reads {V1} and {V2}.")
        dynamic = config.get("dynamic") or {}
        formats = gptq.read_formats(path, config, lambda name: _override(name, dynamic))
        yield from gptq.read_layers(path, formats, offset_zeros=version == V1)

    def logits(self, path: Path) -> Run:
        """Load it with GPTQModel's portable kernels, which compute in float16."""
        import torch
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(str(path), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)

        def run(batch: Any) -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = model.model(input_ids=batch, use_cache=False).logits
            return logits.float()

        return run


def _config(source: Source) -> dict[str, Any]:
    usual, formats, own = gptq.most_used(source), source.formats, OwnNames(source.model)
    by_format: dict[Format | None, list[str]] = {}
    for name in linear_names(source):
        fmt = formats.get(name)
        kept = by_format.setdefault(fmt if fmt and fmt.integer else None, [])
        kept += own.spellings(name)
    dynamic: dict[str, dict[str, Any]] = {}
    for fmt, names in by_format.items():
        for name in names if fmt != usual else []:
            pattern = gptq.name_pattern(name, names)
            dynamic["-:" + pattern if fmt is None else "+:" + pattern] = _entry(fmt) if fmt else {}
    symmetric = all(fmt.symmetric for fmt in formats.values())
    return {
        "quant_method": "gptq",
        **_entry(usual),
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": V1 if symmetric else V2,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def _entry(fmt: Format) -> dict[str, Any]:
    return {"bits": fmt.bits, "group_size": gptq.group_size(fmt), "sym": fmt.symmetric}


def _override(name: str, dynamic: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the first pattern that matches says, as GPTQModel reads them."""
    for pattern, entry in dynamic.items():
        if re.match(re.sub(r"^[+-]:", "", pattern), name):
            return entry
    return {}

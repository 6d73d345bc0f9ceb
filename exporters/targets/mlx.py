"""Folders of mlx-lm, for Apple silicon and anything else MLX runs on."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...models.layers import layer_kind
from ...models.measure import Run
from ...models.side_files import own_config
from ...models.workload import LoadedModel
from ...quantizers.format import Format
from ..configs.folder import TensorFiles, linear_names, read_config, write_folder
from ..configs.gptq import most_used
from ..configs.own_names import OwnNames
from ..layouts.packing import from_mlx, to_mlx
from ..source import Source
from . import EXPORTERS, Exporter, Stored

PARTS = ("weight", "scales", "biases")


@EXPORTERS.register("mlx")
class Mlx(Exporter):
    """For mlx-lm, embeddings included.

    MLX stores a bias per group where we store a zero point: w = q * scale + bias. Of a symmetric
    format float16 holds it exactly. Of an asymmetric one only float32 does, and the scales must
    have the same dtype.
    """

    runtimes = ("mlx",)
    extra = "mlx"
    module = "mlx_lm"
    form: ClassVar[Literal["folder", "file"] | None] = "folder"
    config_suffix = ".json"
    noise = "float32 rounding of the logits"
    max_kl = 1e-6

    def usage(self, path: Path, source: Source) -> str:
        """How mlx-lm reads the folder."""
        if path.suffix == ".json":
            return (
                "the section 'quantization' of config.json; mlx_lm.convert takes a quant_predicate"
            )
        return f"mlx_lm.generate --model {shlex.quote(str(path))}"

    def config(self, source: Source) -> str:
        """The ``quantization`` section of an mlx-lm config.json."""
        return json.dumps(_config(source), indent=1) + "\n"

    def write(self, source: Source, out: Path) -> None:
        """Write affine weights, and the section under both names that mlx-lm writes."""
        config = _config(source)
        entries = {"quantization": config, "quantization_config": config}
        write_folder(source, out, to_mlx, entries | _as_before(source))

    def recognizes(self, path: Path) -> bool:
        """A folder whose config.json has a section ``quantization`` with bits."""
        section = read_config(path).get("quantization")
        return isinstance(section, dict) and "bits" in section

    def read(self, path: Path, model: LoadedModel | None = None) -> Iterator[Stored]:
        """The quantized matrices of a folder.

        Whether a format is symmetric is not said there: it is if every bias is -2^(b-1) scales.

        Raises:
            ValueError: If the mode is not affine, or a matrix has no format of ours.
        """
        section, files = read_config(path)["quantization"], TensorFiles(path)
        for module in files.modules_with("scales"):
            own = section.get(module)
            entry = section if not isinstance(own, dict) else section | own
            if entry.get("mode", "affine") != "affine":
                raise ValueError(
                    f"{path}: {module!r} is in mode {entry['mode']!r}; bitplan has no such format."
                )
            parts = files.parts(module, PARTS)
            scales, biases = parts["scales"].float(), parts["biases"].float()
            bits, size = entry["bits"], entry["group_size"]
            symmetric = torch.equal(biases, scales * -(2 ** (bits - 1)))
            try:
                fmt = Format.of_integers(bits, size, symmetric)
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"{path}: {module!r} has {bits} bits by groups of {size}, for which bitplan "
                    "has no format."
                ) from error
            shape = (scales.shape[0], scales.shape[1] * size)
            if parts["weight"].shape[1] * 32 != shape[1] * bits:
                raise ValueError(
                    f"{path}: {module!r} is {list(parts['weight'].shape)} words, which is no {fmt} "
                    f"matrix {list(shape)}: the configuration belongs to other weights."
                )

            def weight(module: str = module, fmt: Format = fmt) -> Tensor:
                return from_mlx(files.parts(module, PARTS), fmt).dequantize()

            yield Stored(module, shape, fmt, sum(part.nbytes for part in parts.values()), weight)

    def most_tokens(self) -> int | None:
        """Few where MLX has only its portable kernels, which dequantize for every token."""
        return None if sys.platform == "darwin" else 128

    def logits(self, path: Path) -> Run:
        """Load it with mlx-lm, computing in float32; by itself it takes the dtype of the scales."""
        import mlx.core as mx
        import numpy as np
        from mlx_lm.utils import load_model

        model, _ = load_model(path)
        model.set_dtype(mx.float32)

        def run(batch: Any) -> Tensor:
            logits = model(mx.array(batch.numpy())).astype(mx.float32)
            return torch.from_numpy(np.array(logits))

        return run


def _config(source: Source) -> dict[str, Any]:
    """Defaults, then every module that MLX could quantize: its entry, or False."""
    usual = _entry(most_used(source))
    config: dict[str, Any] = dict(usual)
    formats, modules = source.formats, source.model.module.named_modules()
    names = OwnNames(source.model)
    embeddings = [name for name, m in modules if layer_kind(m) == "embedding"]
    for name in (*embeddings, *linear_names(source, also=embeddings)):
        fmt, own = formats.get(name), names.spellings(name)[0]
        config[own] = _entry(fmt) if fmt and fmt.integer else False
    return config


def _as_before(source: Source) -> dict[str, Any]:
    """Entries of config.json under the names from before transformers 5, which mlx-lm reads.

    Where it does not find them it takes its defaults, without a word.
    """
    origin, module = source.model.origin, source.model.module
    config = None if origin is None else own_config(origin.folder)
    if config is None:
        made: Any = getattr(module, "config", None)
        config = made.to_dict() if hasattr(made, "to_dict") else {}
    entries = _rotations(config)
    if isinstance(text := config.get("text_config"), dict):  # a model of images and text
        if "vocab_size" in text and "vocab_size" not in config:
            entries["vocab_size"] = text["vocab_size"]
        if inner := _rotations(text):
            entries["text_config"] = text | inner
    return entries


def _rotations(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding of a configuration that has it in the new form alone."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or "rope_theta" in config:
        return {}
    local = parameters.get("sliding_attention")
    parameters = parameters.get("full_attention", parameters)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return {}
    entries: dict[str, Any] = {"rope_theta": parameters["rope_theta"]}
    if parameters.get("rope_type", "default") != "default":
        entries["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    if isinstance(local, dict) and "rope_theta" in local:
        entries["rope_local_base_freq"] = local["rope_theta"]
    return entries


def _entry(fmt: Format) -> dict[str, Any]:
    return {"group_size": fmt.group_size, "bits": fmt.bits, "mode": "affine"}

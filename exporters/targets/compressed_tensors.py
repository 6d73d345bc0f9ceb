"""Checkpoints of the compressed-tensors library, which transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...models.measure import Run
from ...models.workload import LoadedModel
from ...quantizers.format import Format
from ..configs.folder import (
    TensorFiles,
    linear_names,
    method_of,
    read_config,
    transformers_logits,
    write_folder,
)
from ..configs.gptq import most_used
from ..configs.own_names import OwnNames
from ..configs.schemes import ORDER, PARTS, class_names, group_of, packed_modules
from ..layouts.packing import from_compressed_tensors, to_compressed_tensors
from ..source import Source
from . import EXPORTERS, Exporter, Stored


@EXPORTERS.register("compressed_tensors")
class CompressedTensors(Exporter):
    """For transformers.

    A loader casts the float16 scales to the dtype of the model first: with float32 activations
    the weights are exactly ours, with bfloat16 they are rounded to eight bits.
    """

    runtimes: ClassVar[tuple[str, ...]] = ("transformers",)
    extra: ClassVar[str | None] = "compressed-tensors"
    module: ClassVar[str | None] = "compressed_tensors"
    form: ClassVar[Literal["folder", "file"] | None] = "folder"
    noise = "none: the logits are equal bit for bit"
    max_kl = 1e-6

    def usage(self, path: Path, source: Source) -> str:
        """How transformers reads it."""
        return f"AutoModelForCausalLM.from_pretrained({str(path)!r}), without dequantize=True"

    def write(self, source: Source, out: Path) -> None:
        """Write ``pack-quantized`` tensors and a ``quantization_config`` with exact names."""
        write_folder(source, out, to_compressed_tensors, {"quantization_config": _config(source)})

    def recognizes(self, path: Path) -> bool:
        """A folder whose quantization_config says so."""
        return method_of(path) == "compressed-tensors"

    def read(self, path: Path, model: LoadedModel | None = None) -> Iterator[Stored]:
        """The packed matrices of a folder.

        Raises:
            ValueError: If a matrix has no group in the configuration, or no format of ours.
        """
        config, files = read_config(path)["quantization_config"], TensorFiles(path)
        modules = dict(model.module.named_modules(remove_duplicate=False)) if model else {}
        names = OwnNames(model) if model else None
        for module in packed_modules(path, config, files):
            known = modules.get(names.canonical(module)) if names else None
            fmt = _format_of(path, module, config, class_names(known))
            parts = files.parts(module, ("weight_shape",))
            rows, cols = parts["weight_shape"].tolist()
            words, scales = (files.shape(f"{module}.{part}") for part in PARTS[:2])
            if words != [rows, _words(cols, fmt.bits)] or scales != [rows, fmt.groups(cols)]:
                raise ValueError(
                    f"{path}: {module!r} is {words} words and {scales} scales, which is no {fmt} "
                    f"matrix [{rows}, {cols}]: the configuration belongs to other weights."
                )
            nbytes = sum(tensor.nbytes for tensor in files.parts(module, PARTS).values())

            def weight(module: str = module, fmt: Format = fmt) -> Tensor:
                if f"{module}.{ORDER}" in files:
                    raise ValueError(
                        f"{path}: {module!r} is stored with reordered columns ({ORDER}), for which "
                        "bitplan has no format: its bits can be imported, not its weights."
                    )
                tensors = files.parts(module, PARTS)
                tensors["weight_scale"] = tensors["weight_scale"].half()
                return from_compressed_tensors(tensors, fmt).dequantize()

            yield Stored(module, (rows, cols), fmt, nbytes, weight)

    def logits(self, path: Path) -> Run:
        """Load it with transformers, which keeps the weights packed until they are used."""
        import compressed_tensors  # noqa: F401  # a clear error where it is missing

        return transformers_logits(path)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _config(source: Source) -> dict[str, Any]:
    most_used(source)  # refuses a plan that quantizes nothing
    own, targets = OwnNames(source.model), dict[Format, list[str]]()
    for name, fmt in source.formats.items():
        if fmt.integer:
            targets.setdefault(fmt, []).extend(own.spellings(name))
    groups = {
        f"group_{i}": {
            "targets": targets[fmt],
            "format": "pack-quantized",
            "weights": _weights(fmt),
            "input_activations": None,
            "output_activations": None,
        }
        for i, fmt in enumerate(targets)
    }
    formats = source.formats
    left = [n for n in linear_names(source) if n not in formats or not formats[n].integer]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [spelling for name in left for spelling in own.spellings(name)],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _weights(fmt: Format) -> dict[str, Any]:
    strategy = (
        {"strategy": "group", "group_size": fmt.group_size}
        if fmt.group_size > 0
        else {"strategy": "channel"}
    )
    return {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        **strategy,
        "dynamic": False,
    }


def _format_of(path: Path, module: str, config: dict[str, Any], kinds: tuple[str, ...]) -> Format:
    """The format of the group that a module belongs to."""
    group = group_of(module, config["config_groups"], (*kinds, "Linear"))
    if group is None:
        raise ValueError(f"{path}: {module!r} is packed, but no configuration group names it.")
    return _parse(path, module, group["weights"])


def _parse(path: Path, module: str, weights: dict[str, Any]) -> Format:
    if weights.get("type", "int") != "int":
        raise ValueError(
            f"{path}: {module!r} holds {weights['num_bits']}-bit floats, for which bitplan has no "
            "format."
        )
    size = {"group": weights.get("group_size"), "channel": 0}.get(weights["strategy"])
    try:
        return Format.of_integers(weights["num_bits"], size, weights["symmetric"])  # type: ignore[arg-type]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: {module!r} has {weights['num_bits']} bits by {weights['strategy']} "
            f"{weights.get('group_size') or ''}, for which bitplan has no format."
        ) from error

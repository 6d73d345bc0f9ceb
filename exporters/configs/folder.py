"""Checkpoints in the layout of the Hugging Face Hub: safetensors beside a config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...jobs.materialize import save_hugging_face_files
from ...models.families import loader_of, quiet
from ...models.layers import layer_kind
from ...models.measure import Run
from ...models.origin import tensor_files
from ...models.side_files import missing_files, write_config
from ...models.trust import is_trusted
from ...quantizers.packed import PackedTensor
from ..source import Source
from .own_names import OwnNames, check_inventory

CONFIG = "config.json"
FILE = "model.safetensors"
SHARD = 2_000_000_000  # bytes of tensors per file, and so the most that is held to be written


def write_folder(
    source: Source,
    out: Path,
    pack: Callable[[PackedTensor], Mapping[str, Tensor]],
    entries: Mapping[str, Any],
) -> None:
    """Write the weights, config.json and everything else of the model's own folder.

    Tensors and fields have the names of the model's checkpoint, where it came from one.

    Args:
        source: Plan and weights of a causal language model of transformers.
        out: An existing empty folder.
        pack: Makes the tensors of a quantized matrix, named without their module.
        entries: What the target adds to config.json.

    Raises:
        ValueError: If transformers has no configuration for the model, or something of the
            model's own folder is missing in what was written.
    """
    save_hugging_face_files(source.model, out)
    if not (out / CONFIG).is_file():
        raise ValueError(
            f"{source.plan.model.id} is no causal language model of transformers, and these "
            "folders hold no other. `--to onnx` takes any module."
        )

    own = OwnNames(source.model)

    def tensors() -> Iterator[dict[str, Tensor]]:
        for name, packed in source.each():
            parts = packed.tensors if packed.fmt.floating else pack(packed)
            module = own.module(name)
            yield {f"{module}.{part}": tensor for part, tensor in parts.items()}
        yield from own.tensors(source.others())

    save_tensors(tensors(), out)
    config = read_config(out)
    if source.model.origin is None or not config.keys() & {"torch_dtype", "dtype"}:
        config["dtype"] = source.model.source_dtype
    write_config(config | dict(entries), out)
    check_inventory(source, tensor_files(out))
    if source.model.origin and (missing := missing_files(source.model.origin.folder, out)):
        raise ValueError(
            f"{missing[0]} of {source.model.origin.folder} is missing in what was written. "
            "Nothing was kept; please report this."
        )


def save_tensors(tensors: Iterable[Mapping[str, Tensor]], folder: Path) -> None:
    """Write tensors as they come, so that no more than one file of them is in memory.

    Up to ``SHARD`` bytes become ``model.safetensors``; more become several files
    (``model-00001-of-00003.safetensors``) with an index, as on the Hub.

    Args:
        tensors: Tensors by name; those that come together stay in one file.
        folder: An existing folder.
    """
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(held, folder / str(len(files)), {"format": "pt"})
        files.append(list(held))
        held.clear()

    for together in tensors:
        more = sum(tensor.nbytes for tensor in together.values())
        if held and size + more > SHARD:
            flush()
            size = 0
        held |= together
        size += more
        total += more
    flush()
    if len(files) == 1:
        (folder / "0").rename(folder / FILE)
        return
    places: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / str(i)).rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index, indent=1) + "\n")


def linear_names(source: Source, also: Sequence[str] = ()) -> list[str]:
    """Names of all linear layers of the model, planned or not.

    Args:
        source: Plan and weights.
        also: Other modules that the target can quantize.

    Raises:
        ValueError: If the plan quantizes another matrix.
    """
    modules = dict(source.model.module.named_modules(remove_duplicate=False))
    for unit in source.units:
        quantized = source.formats[unit.name].integer
        module = modules.get(unit.name)
        if quantized and layer_kind(module) != "linear" and unit.name not in also:
            owner = module or modules[unit.name.rpartition(".")[0].partition("[")[0]]
            raise ValueError(
                f"{unit.name} is {'a' if module else 'in a'} {type(owner).__name__}, which this "
                f"target does not quantize. Leave it out of the plan (--exclude '{unit.name}')."
            )
    return [name for name, m in modules.items() if layer_kind(m) == "linear"]


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder; empty if there is none."""
    file = path / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (UnicodeDecodeError, json.JSONDecodeError):
        content = {}
    return content if isinstance(content, dict) else {}


def method_of(path: Path) -> str:
    """The ``quant_method`` of a folder's quantization_config; empty if there is none."""
    config = read_config(path).get("quantization_config")
    return str(config.get("quant_method", "")) if isinstance(config, dict) else ""


class TensorFiles:
    """The tensors of a folder's safetensors files, read when they are asked for.

    Raises:
        ValueError: If there is no such file, or one is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file_of: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    self._file_of[name] = file
        if not self._file_of:
            raise ValueError(f"{path} has no safetensors file, so there are no weights in it.")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def dtype(self, name: str) -> str:
        """The type of a tensor as the file's header writes it: ``BF16``."""
        with self._open(self._file(name)) as opened:
            return str(opened.get_slice(name).get_dtype())

    def modules_with(self, part: str) -> Iterator[str]:
        """Names of modules that have a tensor called ``part``, in the order of the files."""
        for name in self._file_of:
            module, _, last = name.rpartition(".")
            if last == part:
                yield module

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, from its file's header."""
        with self._open(self._file(name)) as opened:
            return list(opened.get_slice(name).get_shape())

    def parts(self, module: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of some tensors of a module that it has."""
        found = {part: f"{module}.{part}" for part in names if f"{module}.{part}" in self}
        return {part: self.get(name) for part, name in found.items()}

    def get(self, name: str) -> Tensor:
        """A tensor."""
        with self._open(self._file(name)) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def _file(self, name: str) -> Path:
        if name not in self._file_of:
            raise ValueError(f"{self.path} lacks the tensor {name!r}. Write or copy it again.")
        return self._file_of[name]

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged or truncated ({error}). Write or copy it again."
            ) from error


def transformers_logits(path: Path, dtype: torch.dtype = torch.float32) -> Run:
    """Load a folder with transformers on the CPU.

    Args:
        path: The folder.
        dtype: What the activations are.

    Returns:
        A function from token ids [samples, positions] to float32 logits.
    """
    from transformers import AutoConfig

    trusted = {"trust_remote_code": is_trusted()}
    config = AutoConfig.from_pretrained(path, **trusted)
    with quiet():
        loaded: Any = loader_of(config).from_pretrained(
            path, dtype=dtype, device_map="cpu", **trusted
        )
    model = loaded.eval()

    def run(batch: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=batch, use_cache=False).logits
        return logits.float()

    return run

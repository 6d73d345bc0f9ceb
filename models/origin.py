"""Where a model came from: the tensors of its checkpoint by their own names, and its folder.

Libraries rename and fuse tensors in memory.  Files for other tools need the names the checkpoint
had, and the tensors that the architecture in memory does not know.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .coverage import Left
from .fp8 import ACTIVATIONS, SCALE, decode_fp8, scales_of, weights_of

_MXFP4_PARTS = ("_blocks", "_scales")  # what they add to the name of the weight


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor of the checkpoint that the model does not have: it is written as it is.

    Attributes:
        name: Its name.
        shape: Its shape.
        nbytes: Bytes it takes.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int

    def left(self) -> Left:
        """As a weight in no unit."""
        return Left(
            self.name,
            torch.Size(self.shape).numel(),
            "not in the architecture, carried along unchanged",
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint of a model.

    Attributes:
        folder: Where its config.json and side files are.
        files: Tensor -> file that holds it.
        names: Tensor in memory -> its names in the checkpoint, where those differ: one if it was
            renamed, several if it was fused, none if it is a part of one there.
        carried: Tensors that the model does not have.
        fp8: Weight in memory -> names of the 8-bit floats and of the scales it was decoded from.
        blocks: Packed four-bit floats and their scales, which the model has decoded.
    """

    folder: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    carried: tuple[Carried, ...] = ()
    fp8: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    blocks: frozenset[str] = frozenset()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the checkpoint as they are stored, one at a time."""
        for name in names:
            yield name, read_tensor(self.files[name], name)

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are carried along."""
        return self.read(one.name for one in self.carried)


def origin_of(folder: Path, module: nn.Module) -> Origin:
    """Find out what of a checkpoint a loaded model has, and under which names.

    Args:
        folder: A folder with config.json and safetensors files, or PyTorch's own.
        module: What transformers loaded from it.

    Raises:
        ValueError: If a file of it is damaged.
    """
    files = tensor_files(folder)
    names, known = own_names(module, files)
    fp8 = {}
    for key in module.state_dict():
        (own, *more) = names.get(key, (key,)) or ("", "")
        if not more and f"{own}{SCALE}" in files:
            fp8[key] = (own, f"{own}{SCALE}")
    decoded = known - files.keys()
    blocks = {name + part for name in decoded for part in _MXFP4_PARTS}.intersection(files)
    unknown = _unknown(files, known | blocks)
    opened: dict[Path, Mapping[str, Tensor]] = {}
    carried = tuple(Carried(name, *_size(files[name], name, opened)) for name in unknown)
    return Origin(folder, files, names, carried, fp8, frozenset(blocks))


def _unknown(files: Collection[str], known: Collection[str]) -> list[str]:
    """Tensors that the model does not have; scales go where their weights go."""
    scales = scales_of(files)
    lost = {name for name in files if name not in known and name not in scales}
    modules = {name.rpartition(".")[0] for name in lost}
    return [
        name
        for name in files
        if name in lost
        or (name.endswith(SCALE) and name.removesuffix(SCALE) in lost)
        or (name in scales and name.endswith(ACTIVATIONS) and name.rpartition(".")[0] in modules)
    ]


def own_names(
    module: nn.Module, stored: Collection[str]
) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """What the tensors of a model are called in its checkpoint.

    Args:
        module: A model of transformers.
        stored: The names in the checkpoint; empty if there is none to compare with.

    Returns:
        The names where they differ (:class:`Origin`), and all names of tensors that it has.
    """
    meta = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for key, tensor in module.state_dict().items()
    }
    whole = set(reverted(module, meta))
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    names: dict[str, tuple[str, ...]] = {}
    same = whole == meta.keys()  # nothing is renamed but for a prefix
    for key, tensor in meta.items():
        own = (key,) if same else _reverted_names(module, key, tensor, whole)
        if own and not all(name in stored for name in own):
            near = (key, key.removeprefix(prefix), prefix + key)
            own = next(((name,) for name in near if name in stored), own)
        if own != (key,):
            names[key] = own
    known = whole | {name for own in names.values() for name in own}
    return names, known | (meta.keys() - names.keys())


def reverted(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under the names, and in the pieces, that its checkpoint has them in."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(module, PreTrainedModel):
        return dict(tensors)
    return dict(revert_weight_conversion(module, dict(tensors)))


def _reverted_names(
    module: nn.Module, key: str, tensor: Tensor, whole: Collection[str]
) -> tuple[str, ...]:
    try:
        own = tuple(reverted(module, {key: tensor}))
    except Exception:  # it takes several tensors in memory to make one of the checkpoint
        return ()
    return own if all(name in whole for name in own) else ()


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor -> file, of the files that the checkpoint in a folder consists of.

    Raises:
        ValueError: If one is damaged, or the index names one in another folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return dict.fromkeys(_tensor_names(folder / name), folder / name)
        if index.is_file():
            content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
            for file in set(content["weight_map"].values()):
                if Path(file).name != file:
                    raise ValueError(
                        f"{index} names the file {file!r}, and a checkpoint's files lie beside "
                        "its index. Copy the model again."
                    )
            return {key: folder / file for key, file in content["weight_map"].items()}
    return {}


def decoded_state(files: Mapping[str, Path], block: tuple[int, int]) -> dict[str, Tensor]:
    """All tensors of a checkpoint, the 8-bit floats decoded.

    Args:
        files: Tensor -> the file that holds it.
        block: See :func:`decode_fp8`.

    Raises:
        ValueError: If a tensor has no fitting scales; it is named.
    """
    found = {}
    for name in weights_of(files):
        tensor = read_tensor(files[name], name)
        if f"{name}{SCALE}" in files:
            try:
                tensor = decode_fp8(
                    tensor, read_tensor(files[f"{name}{SCALE}"], name + SCALE), block
                )
            except ValueError as error:
                raise ValueError(f"{name!r} of 8-bit floats cannot be decoded: {error}") from error
        elif tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(f"{name!r} is of 8-bit floats, but the file has no {name + SCALE!r}")
        found[name] = tensor
    return found


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor
    mapped = zipfile.is_zipfile(file)  # those from before PyTorch 1.6 are not
    tensor = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)[name]
    return tensor.clone()


def _tensor_names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(torch.load(file, map_location="meta", weights_only=True))
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}). Copy it again.") from error


def _size(
    file: Path, name: str, opened: dict[Path, Mapping[str, Tensor]]
) -> tuple[tuple[int, ...], int]:
    """Shape and bytes of a tensor, from the header where there is one."""
    if file.suffix != ".safetensors":
        if file not in opened:
            opened[file] = torch.load(file, map_location="meta", weights_only=True)
        tensor = opened[file][name]
        return tuple(tensor.shape), tensor.nbytes
    with safe_open(file, framework="pt") as header:
        found = header.get_slice(name)
        shape, kind = tuple(found.get_shape()), str(found.get_dtype())
    digits = re.search(r"\d+", kind)  # BF16, F8_E4M3, I64; BOOL has none
    return shape, math.prod(shape) * int(digits[0] if digits else 8) // 8

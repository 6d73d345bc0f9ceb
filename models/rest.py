"""What a packed folder holds besides packed weights: in the checkpoint's own form, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fp8 import SCALE, block_of, decode_fp8, weights_of
from .origin import Carried, Origin, read_tensor
from .stored_form import quantization_of

_ENTRY = 60  # bytes of a name's brackets, quotes and numbers in the header, at most


@dataclass(frozen=True, slots=True)
class Rest:
    """Tensors outside the plan by the names they are stored under, and what to read them by.

    Attributes:
        tensors: The tensors.
        header: JSON data: which are not the model's, which are decoded, and their own names.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def to_stored_form(origin: Origin | None, others: Mapping[str, Tensor]) -> Rest:
    """Put 8-bit floats back for what was decoded from them, and add what the model does not have.

    Args:
        origin: The model's checkpoint; None for a model without one.
        others: Tensors outside the plan by their names in memory.
    """
    if origin is None:
        return Rest(dict(others), {})
    tensors, decoded = dict(others), {}
    block = block_of(quantization_of(origin.folder) or {})
    for key in kept_as_fp8(origin, others):
        stored = dict(origin.read(origin.fp8[key]))
        weight, scale = stored.values()
        # Only what decodes to the very weights; a model may have been changed since.
        if torch.equal(decode_fp8(weight, scale, block).to(others[key].dtype), others[key]):
            del tensors[key]
            tensors |= stored
            decoded[key] = [*stored, *block]
    header: dict[str, Any] = {"fp8": decoded} if decoded else {}
    if origin.names:
        header["names"] = {key: list(own) for key, own in origin.names.items()}
    if origin.carried:
        tensors |= dict(origin.others())
        header["carried"] = [[one.name, list(one.shape), one.nbytes] for one in origin.carried]
        if any(block):
            header["carried_block"] = [*block]
    return Rest(tensors, header)


def from_stored_form(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors by their names in memory, 8-bit floats decoded to bfloat16."""
    found = dict(tensors)
    for one, *_ in header.get("carried", ()):
        found.pop(one, None)
    for key, (weight, scale, rows, cols) in header.get("fp8", {}).items():
        found[key] = decode_fp8(found.pop(weight), found.pop(scale), (rows, cols))
    return found


def carried(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the model does not have, for other tools: 8-bit floats decoded."""
    names = [str(name) for name, *_ in header.get("carried", ())]
    rows, cols = header.get("carried_block", (0, 0))
    return _decoded(names, tensors.__getitem__, (rows, cols))


def carried_of(origin: Origin) -> Iterator[tuple[str, Tensor]]:
    """The same of a checkpoint, one at a time."""
    block = block_of(quantization_of(origin.folder) or {})
    names = [one.name for one in origin.carried]
    return _decoded(names, lambda name: read_tensor(origin.files[name], name), block)


def _decoded(
    names: Collection[str], read: Callable[[str], Tensor], block: tuple[int, int]
) -> Iterator[tuple[str, Tensor]]:
    stored = set(names)
    for name in weights_of(names):
        tensor = read(name)
        if f"{name}{SCALE}" in stored:
            tensor = decode_fp8(tensor, read(f"{name}{SCALE}"), block)
        yield name, tensor


def packed_origin(folder: Path, file: Path, header: Mapping[str, Any]) -> Origin:
    """The checkpoint that a packed folder stands for."""
    carried = tuple(
        Carried(str(name), tuple(shape), int(size))
        for name, shape, size in header.get("carried", ())
    )
    names = {str(key): tuple(map(str, own)) for key, own in header.get("names", {}).items()}
    return Origin(folder, {one.name: file for one in carried}, names, carried)


def kept_as_fp8(origin: Origin | None, keys: Collection[str]) -> list[str]:
    """Those of the tensors in memory that were decoded from 8-bit floats of their own."""
    return [] if origin is None else [key for key in origin.fp8 if key in keys]


def extra_bytes(origin: Origin | None, others: Collection[str]) -> int:
    """Bytes that a packed folder takes for what it carries along and for names, at most."""
    if origin is None:
        return 0
    size = sum(one.nbytes + 3 * len(one.name) + 4 * _ENTRY for one in origin.carried)
    size += sum(len(key) + sum(map(len, own)) + _ENTRY for key, own in origin.names.items())
    return size + sum(
        len(key) + 3 * sum(map(len, origin.fp8[key])) + 4 * _ENTRY
        for key in kept_as_fp8(origin, others)
    )


def fp8_bytes(origin: Origin, key: str) -> int:
    """Bytes of the 8-bit floats and scales that a weight was decoded from."""
    return sum(read_tensor(origin.files[name], name).nbytes for name in origin.fp8[key])

"""Tensors in files, as memory maps: their pages are read when used, and let go of when asked."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .._base.tensors import bytes_of
from ..quantizers.tensor_file import NAMES

_MODELS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
# The dtypes of safetensors that a model may have.
DTYPES: dict[str, torch.dtype] = {NAMES[name]: getattr(torch, name) for name in (*_MODELS, "bool")}

_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address; tensors hold them


class Entry(NamedTuple):
    """Where a tensor is in a file: dtype, shape and the position of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _map(file: IO[bytes]) -> mmap.mmap:
    """A file's memory, private to this process: nothing written to it reaches the file."""
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _maps[torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()] = memory
    return memory


def _tensor(memory: mmap.mmap, entry: Entry) -> Tensor:
    """A tensor in a file: a view of the map."""
    count = torch.Size(entry.shape).numel()
    if count == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    view = torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.begin)
    return view.view(entry.shape)


class MappedFile:
    """A safetensors file.

    Args:
        path: The file.

    Attributes:
        entries: Its tensors by name.
        header: The bytes that describe them.

    Raises:
        ValueError: If it is damaged, or holds a dtype that no model is computed from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                if size > path.stat().st_size - 8:
                    raise ValueError(f"its header of {size:,} bytes ends after the file")
                self.header = file.read(size)
                found = json.loads(self.header)
                found.pop("__metadata__", None)
                self.entries = {n: _entry(n, about, 8 + size) for n, about in found.items()}
                self._map = _map(file)
        except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be mapped ({type(error).__name__}: {error})"
            ) from error
        for name, entry in self.entries.items():
            if entry.begin + entry.nbytes > len(self._map):
                raise ValueError(f"{path} is truncated: it ends before the tensor {name!r} does")

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, in its own dtype, whose pages are read when they are used."""
        return _tensor(self._map, self.entries[name])


class Spill:
    """Tensors written to a file without a name, which is gone when nobody uses them any more.

    Args:
        folder: The folder whose disk is used.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder or spill_folder())  # noqa: SIM115
        self._entries: dict[str, Entry] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor."""
        begin = self._file.tell()
        padding = -begin % 64
        self._file.write(bytes(padding))
        self._file.write(bytes_of(tensor.contiguous()))
        self._entries[name] = Entry(tensor.dtype, tuple(tensor.shape), begin + padding)

    def tensors(self) -> dict[str, Tensor]:
        """All that was written, mapped."""
        if not self._entries:
            return {}
        self._file.write(bytes(1))  # a file of empty tensors is empty, which cannot be mapped
        self._file.flush()
        memory = _map(self._file)
        return {name: _tensor(memory, entry) for name, entry in self._entries.items()}


def spill_folder() -> Path | None:
    """Where temporary files of the size of a model go: the user's cache, as /tmp may be memory."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitplan"
    with suppress(OSError):
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    return None


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapped file."""
    return _map_of(tensor) is not None


def release(tensor: Tensor) -> None:
    """Let go of the pages of a mapped tensor, which are read again when it is used again.

    Others are left as they are.
    """
    found = _map_of(tensor)
    if found is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    memory, offset = found
    page, size = mmap.PAGESIZE, tensor.untyped_storage().nbytes()
    first = offset // page * page
    last = min(len(memory), -(-(offset + size) // page) * page)
    memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def _map_of(tensor: Tensor) -> tuple[mmap.mmap, int] | None:
    """The map that a tensor lies in, and where in it."""
    if tensor.device.type != "cpu" or not _maps:
        return None
    address = tensor.untyped_storage().data_ptr()
    for start, memory in list(_maps.items()):
        if start <= address < start + len(memory):
            return memory, address - start
    return None


def _entry(name: str, about: Mapping[str, Any], start: int) -> Entry:
    """Where a tensor is, of what a header says of it; its data starts at ``start``."""
    begin, end = map(int, about["data_offsets"])
    shape = tuple(map(int, about["shape"]))
    entry = Entry(DTYPES[str(about["dtype"])], shape, start + begin)
    if (
        begin < 0
        or min(shape, default=0) < 0
        or end - begin != math.prod((entry.dtype.itemsize, *shape))
    ):
        raise ValueError(f"tensor {name!r} of shape {shape} cannot be bytes {begin} to {end}")
    return entry


def mapped_files(folder: Path) -> Iterator[MappedFile]:
    """The safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        ValueError: If there are none, or one is missing or damaged.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif single.is_file():
        names = [single.name]
    else:
        raise ValueError("it has no model.safetensors and no model.safetensors.index.json")
    for name in names:
        yield MappedFile(folder / name)

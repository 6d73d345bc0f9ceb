"""A safetensors file written one tensor at a time."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .._base.tensors import bytes_of

NAMES = {  # of dtypes in safetensors files, by those of torch
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_LARGEST_CRC = (1 << 32) - 1

Metadata = Callable[[Mapping[str, int]], Mapping[str, str]]


class TensorFile:
    """Tensors are put in any order, each at the place that its size and name give it.

    Args:
        path: The file, which is made.
        sizes: dtype, as torch calls it, and shape of every tensor by name.
        metadata: Makes the metadata from the CRC-32 of every tensor, by name; the room it is given
            is what it takes with the largest ones.

    Raises:
        ValueError: If there is no such dtype in a safetensors file.
    """

    def __init__(
        self, path: Path, sizes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Metadata
    ) -> None:
        for name, (dtype, _) in sizes.items():
            if dtype not in NAMES:
                raise ValueError(f"Tensor {name!r} is {dtype}, which safetensors cannot hold.")
        # The largest entries first, so that all of them are aligned.
        names = sorted(sizes, key=lambda name: (-_itemsize(sizes[name][0]), name))
        self._sizes, self._metadata, end = sizes, metadata, 0
        self._offsets: dict[str, tuple[int, int]] = {}
        for name in names:
            dtype, shape = sizes[name]
            self._offsets[name] = end, end + _itemsize(dtype) * math.prod(shape)
            end = self._offsets[name][1]
        self._checksums: dict[str, int] = {}
        room = len(self._header(dict.fromkeys(names, _LARGEST_CRC)))
        self._start = 8 + -(-room // 8) * 8
        self._file = path.open("wb")
        self._file.truncate(self._start + end)

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, which must have the dtype and the shape that were said."""
        found = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        assert found == self._sizes[name], f"{name} is {found}, not {self._sizes[name]}"
        data = bytes_of(tensor)
        self._checksums[name] = zlib.crc32(data)
        self._file.seek(self._start + self._offsets[name][0])
        self._file.write(data)

    def finish(self) -> None:
        """Write the header, when all tensors are there."""
        missing = sorted(self._offsets.keys() - self._checksums.keys())
        assert not missing, f"{missing[0]} was never written"
        size = self._start - 8
        header = self._header({name: self._checksums[name] for name in self._sizes}).ljust(size)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", size) + header)

    def _header(self, checksums: Mapping[str, int]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": dict(self._metadata(checksums))}
        for name, offsets in self._offsets.items():
            dtype, shape = self._sizes[name]
            about = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": list(offsets)}
            entries[name] = about
        return json.dumps(entries, separators=(",", ":")).encode()


def _itemsize(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size

"""Packed weights <-> a folder with one safetensors file."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .format import Format
from .packed import PackedTensor
from .tensor_file import TensorFile

FILE_NAME = "model.safetensors"
VERSION = "2"
WITH_ROWS = "3"  # has weights in parts, which readers of version 2 do not know
_READABLE = ("1", VERSION, WITH_ROWS)  # version 1 has no checksums

Ranges = tuple[tuple[int, int], ...]  # rows of a matrix: [start, stop) after [start, stop)


_Module = tuple[str, tuple[int, int], Ranges | None]  # format, shape, rows of a part


def write_checkpoint(
    folder: Path,
    packed: Mapping[str, PackedTensor] | Iterable[tuple[str, PackedTensor]],
    others: Mapping[str, Tensor],
    header: Mapping[str, Any],
    rows: Mapping[str, Ranges] | None = None,
    formats: Mapping[str, tuple[Format, tuple[int, int]]] | None = None,
) -> None:
    """Write ``model.safetensors`` into an existing folder.

    A packed weight becomes ``<module>.codes``, ``.scale`` and ``.zero``, or ``<module>.weight``
    in a float format.  The bytes of these tensors are exactly ``fmt.stored_bytes(shape)``.  The
    metadata holds the version of the layout, the format and shape of every module, the CRC-32 of
    every tensor, and ``header``; for a part of a matrix, ``matrix[rows:k]``, also which rows of
    it these are.

    Args:
        folder: Where to write: for an atomic result, and a full disk explained, a folder made
            within ``atomic_path``.
        packed: Packed weights by module name; as pairs they are written one after the other, and
            none is kept.
        others: All other tensors of the model by their ``state_dict`` names.
        header: JSON data to keep with the weights, for example the plan.
        rows: The rows of the packed weights that are parts of a matrix.
        formats: Format and shape by module name, where ``packed`` are pairs.

    Raises:
        ValueError: If a name occurs both as a packed part and in ``others``.
        OSError: If the file cannot be written.
    """
    if isinstance(packed, Mapping):
        formats = {module: (weight.fmt, weight.shape) for module, weight in packed.items()}
        packed = packed.items()
    assert formats is not None, "pairs need formats"
    parts = {
        f"{module}.{part}": (dtype, tuple(shape))
        for module, (fmt, size) in formats.items()
        for part, (shape, dtype) in fmt.tensors(size).items()
    }
    if twice := sorted(parts.keys() & others.keys()):
        raise ValueError(f"Tensor {twice[0]!r} is given both packed and unpacked; keep one.")
    modules: dict[str, dict[str, Any]] = {
        module: {"format": fmt.name, "shape": list(size)} for module, (fmt, size) in formats.items()
    }
    for module, ranges in (rows or {}).items():
        modules[module]["rows"] = [list(pair) for pair in ranges]
    content = {"modules": modules, "header": dict(header)}
    version = WITH_ROWS if rows else VERSION
    sizes = parts | {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in others.items()
    }

    def metadata(checksums: Mapping[str, int]) -> dict[str, str]:
        text = json.dumps(content | {"crc32": dict(checksums)})
        return {"format": "pt", "bitplan_version": version, "bitplan": text}

    with TensorFile(folder / FILE_NAME, sizes, metadata) as file:
        for module, weight in packed:
            for part, tensor in weight.tensors.items():
                file.put(f"{module}.{part}", tensor)
        for name, tensor in others.items():
            file.put(name, tensor)
        file.finish()


def read_checkpoint(
    folder: Path,
) -> tuple[dict[str, PackedTensor], dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_checkpoint`` wrote.

    Returns:
        The packed weights, the other tensors and the header; :func:`stored_rows` gives the rows
        of parts.

    Raises:
        ValueError: If the file is missing, truncated, written by a later version of bitplan or
            in a format that this one lacks, or if a tensor is missing, damaged, or has the wrong
            shape or dtype; file and tensor are named.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a packed model: it has no {FILE_NAME}. "
            "Give a folder that 'bitplan quantize' wrote."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or truncated ({error}). Write or copy it again."
        ) from error
    modules, header, checksums = _parse_metadata(path, metadata)
    found = set(tensors)
    packed = {
        module: _take(path, tensors, module, spec, shape)
        for module, (spec, shape, _) in modules.items()
    }
    for name in checksums:
        if name not in found:
            raise ValueError(f"{path} lacks the tensor {name!r}. Write or copy it again.")
    for name, checksum in _file_checksums(path).items():
        if name in checksums and checksum != checksums[name]:
            raise ValueError(
                f"{path}: the tensor {name!r} is damaged: its CRC-32 is not the one that was "
                "written. Copy the file again, or quantize again."
            )
    return packed, tensors, header


def is_ours(folder: Path) -> bool:
    """Whether the weights of a folder are what :func:`write_checkpoint` wrote; reads its header."""
    file = folder / FILE_NAME
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return "bitplan" in (opened.metadata() or {})
    except SafetensorError:  # damaged; whoever loads it says how
        return False


def planned_bytes(folder: Path) -> int:
    """Bytes of the packed weights in a folder, without the other tensors.

    Raises:
        ValueError: If its header is damaged, or a later version wrote it.
    """
    path = folder / FILE_NAME
    with safe_open(path, framework="pt") as file:
        modules, _, _ = _parse_metadata(path, file.metadata() or {})
    return sum(Format.parse(spec).stored_bytes(shape) for spec, shape, _ in modules.values())


def stored_rows(folder: Path) -> dict[str, Ranges]:
    """Which rows of their matrices the parts in a folder are, by the name of the part.

    Raises:
        ValueError: If the header is damaged, or a later version wrote it.
    """
    path = folder / FILE_NAME
    with safe_open(path, framework="pt") as file:
        modules, _, _ = _parse_metadata(path, file.metadata() or {})
    return {name: rows for name, (_, _, rows) in modules.items() if rows is not None}


def _file_checksums(path: Path) -> dict[str, int]:
    """CRC-32 of every tensor in a safetensors file.

    The file is read, not mapped, so that tensors in use share its pages but do not have to be in
    memory all at once.
    """
    found = {}
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            checksum, left = 0, end - begin
            while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
                checksum, left = zlib.crc32(buffer[:count], checksum), left - count
            found[name] = checksum
    return found


def _parse_metadata(
    path: Path, metadata: Mapping[str, str]
) -> tuple[dict[str, _Module], dict[str, Any], dict[str, int]]:
    """Format, shape and rows by module, the header, and the checksums by tensor."""
    version = metadata.get("bitplan_version")
    if version is None:
        raise ValueError(f"{path} was not written by bitplan: its header has no bitplan_version.")
    if version not in _READABLE:
        raise ValueError(
            f"{path} has layout version {version}; this bitplan reads versions "
            f"{', '.join(_READABLE)}. Read it with the bitplan that wrote it, or quantize again."
        )
    try:
        content = json.loads(metadata["bitplan"])
        modules: dict[str, _Module] = {}
        for module, entry in content["modules"].items():
            rows, cols = map(int, entry["shape"])
            some = entry.get("rows")
            ranges = None if some is None else tuple((int(a), int(b)) for a, b in some)
            if (ranges is not None) != ("[rows:" in module):
                raise ValueError(f"it does not say which rows of its matrix {module!r} is")
            if ranges is not None and sum(b - a for a, b in ranges) != rows:
                raise ValueError(f"{module!r} has {rows} rows, but says it is rows {some}")
            modules[module] = (str(entry["format"]), (rows, cols), ranges)
        checksums = {name: int(crc) for name, crc in content.get("crc32", {}).items()}
        return modules, dict(content["header"]), checksums
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged bitplan header ({error}).") from error


def _take(
    path: Path, tensors: dict[str, Tensor], module: str, spec: str, shape: tuple[int, int]
) -> PackedTensor:
    """Move the parts of one module out of ``tensors``."""
    try:
        fmt = Format.parse(spec)
    except ValueError as error:
        held = ", ".join(sorted(name for name in tensors if name.startswith(f"{module}.")))
        raise ValueError(
            f"{path}: module {module!r} (tensors {held or 'none'}) is stored in a format that "
            f"this bitplan cannot read: {error}"
        ) from error
    parts = {}
    for part in fmt.tensors(shape):
        name = f"{module}.{part}"
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name!r}. Write or copy it again.")
        parts[part] = tensors.pop(name)
    try:
        return PackedTensor(fmt, shape, parts)
    except ValueError as error:
        raise ValueError(f"{path}: module {module!r}: {error}") from error

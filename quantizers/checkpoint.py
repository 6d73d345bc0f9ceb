"""Packed weights <-> a folder with one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .format import Format
from .packed import PackedTensor

FILE_NAME = "model.safetensors"
VERSION = "1"


def write_checkpoint(
    folder: Path,
    packed: Mapping[str, PackedTensor],
    others: Mapping[str, Tensor],
    header: Mapping[str, Any],
) -> None:
    """Write ``model.safetensors`` into an existing folder.

    A packed weight becomes ``<module>.codes``, ``.scale`` and ``.zero``, or ``<module>.weight``
    in a float format.  The bytes of these tensors are exactly ``fmt.stored_bytes(shape)``.  The
    metadata holds the format and shape of every module, and ``header``.

    Args:
        folder: Where to write: for an atomic result, and a full disk explained, a folder made
            within ``atomic_path``.
        packed: Packed weights by module name.
        others: All other tensors of the model by their ``state_dict`` names.
        header: JSON data to keep with the weights, for example the plan.

    Raises:
        ValueError: If a name occurs both as a packed part and in ``others``.
        SafetensorError: If the file cannot be written.
    """
    parts = {
        f"{module}.{part}": tensor
        for module, weight in packed.items()
        for part, tensor in weight.tensors.items()
    }
    if twice := sorted(parts.keys() & others.keys()):
        raise ValueError(f"Tensor {twice[0]!r} is given both packed and unpacked; keep one.")
    modules = {
        module: {"format": weight.fmt.name, "shape": list(weight.shape)}
        for module, weight in packed.items()
    }
    metadata = {
        "format": "pt",
        "bitplan_version": VERSION,
        "bitplan": json.dumps({"modules": modules, "header": dict(header)}),
    }
    tensors = parts | {name: tensor.detach().contiguous() for name, tensor in others.items()}
    save_file(tensors, folder / FILE_NAME, metadata)


def read_checkpoint(
    folder: Path,
) -> tuple[dict[str, PackedTensor], dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_checkpoint`` wrote.

    Returns:
        The packed weights, the other tensors and the header.

    Raises:
        ValueError: If the file is missing, truncated, not written by this version of bitplan,
            or if a tensor is missing or has the wrong shape or dtype; file and tensor are named.
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
    modules, header = _parse_metadata(path, metadata)
    packed = {
        module: _take(path, tensors, module, entry["format"], entry["shape"])
        for module, entry in modules.items()
    }
    return packed, tensors, header


def _parse_metadata(
    path: Path, metadata: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    version = metadata.get("bitplan_version")
    if version is None:
        raise ValueError(f"{path} was not written by bitplan: its header has no bitplan_version.")
    if version != VERSION:
        raise ValueError(
            f"{path} has layout version {version}; this bitplan reads version {VERSION}. "
            "Read it with the bitplan that wrote it, or quantize again."
        )
    try:
        content = json.loads(metadata["bitplan"])
        return content["modules"], content["header"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has a damaged bitplan header ({error}).") from error


def _take(
    path: Path, tensors: dict[str, Tensor], module: str, spec: str, shape: list[int]
) -> PackedTensor:
    """Move the parts of one module out of ``tensors``."""
    rows, cols = shape
    fmt = Format.parse(spec)
    parts = {}
    for part in fmt.tensors((rows, cols)):
        name = f"{module}.{part}"
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name!r}. Write or copy it again.")
        parts[part] = tensors.pop(name)
    try:
        return PackedTensor(fmt, (rows, cols), parts)
    except ValueError as error:
        raise ValueError(f"{path}: module {module!r}: {error}") from error

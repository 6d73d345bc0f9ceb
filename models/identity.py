"""What tells one model from another: hashes of its weights and of what computes with them."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from torch import nn

from .._base.files import atomic_path
from .._base.tensors import bytes_of
from .checkpoint import FILES
from .mapped import is_mapped, release, spill_folder
from .trust import code_sha256
from .workload import LoadedModel

_DIGITS = 64  # of a SHA-256


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters and buffers, shared ones once.

    Floating point values are hashed as float32, so a bfloat16 checkpoint has the same hash in
    whichever precision it was loaded.  The hash of weights that stay in their files is kept in the
    user's cache, by the size, times and header of the files and by all tensors that are in memory.
    """
    folder = spill_folder() if hasattr(module, FILES) else None
    kept = folder / "hashes" / _key(module) if folder else None
    if kept is not None and kept.is_file() and len(found := kept.read_text("ascii")) == _DIGITS:
        return found
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        plain = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(plain))
        release(tensor)
    if kept is not None:
        with suppress(OSError), atomic_path(kept) as temporary:
            temporary.write_text(digest.hexdigest(), "ascii")
    return digest.hexdigest()


def _key(module: nn.Module) -> str:
    """What the weights depend on: their files, and the tensors that are in memory."""
    digest = hashlib.sha256(str(getattr(module, FILES)).encode())
    for name, tensor in module.state_dict().items():
        mapped = is_mapped(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {mapped}\n".encode())
        if not mapped:
            digest.update(bytes_of(tensor))
    return digest.hexdigest()


def definition_sha256(model: LoadedModel) -> str:
    """SHA-256 of what computes with the weights: the Python file, or the model's configuration.

    Code that comes with the checkpoint is part of it.
    """
    function = function_reference(model.id)
    if function is not None:
        return hashlib.sha256(function[0].read_bytes()).hexdigest()
    config = getattr(model.module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return hashlib.sha256(repr(model.module).encode()).hexdigest()
    entries = {k: v for k, v in config.to_dict().items() if k != "transformers_version"}
    entries.pop("_name_or_path", None)
    code = None if model.origin is None else code_sha256(model.origin.folder, model.module)
    if code is not None:
        entries["code_sha256"] = code
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()


def function_reference(name: str) -> tuple[Path, str] | None:
    """The file and function of a model given as ``file.py:function``, else None."""
    path, _, function = name.rpartition(":")
    return (Path(path), function) if path.endswith(".py") else None

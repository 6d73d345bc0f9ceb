"""A model from the files of its checkpoint, without reading its weights.

transformers builds the model, renames keys, ties weights and computes buffers, as ever: but of
tensors of one entry each that only look like the weights.  Where each of these has come to lie in
the model, the memory map of its tensor takes its place.  Weights that the model holds fused, such
as a layer's experts, are fused one at a time and written to a temporary file, which is mapped.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .families import loader_of
from .mapped import MappedFile, Spill, mapped_files, release
from .streamed import stream_weights
from .trust import is_trusted, own_code
from .workload import tie

FILES = "_bitplan_files"  # of a module: a hash of the files its weights are in
REVISION = 2  # of that hash and of what is kept by it


def streamed_model(folder: Path) -> nn.Module:
    """The causal language model of a folder, its weights left in its files.

    Args:
        folder: ``config.json`` and safetensors files, single or sharded.

    Returns:
        The frozen model.

    Raises:
        ValueError: If its weights cannot be read like this: no safetensors, quantized weights,
            code of its own that is trusted, or a conversion that is not known; says which.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_trusted() and own_code(folder):
        raise ValueError("it has modelling code of its own")
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    if loader_of(config) is not AutoModelForCausalLM:
        raise ValueError("it is no model of text alone")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantized")
    files = list(mapped_files(folder))
    tensors = {name: file.tensor(name) for file in files for name in file.entries}
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
    tensors = _fused(skeleton, tensors)
    known, placeholders = {}, {}
    for name, tensor in tensors.items():
        one = torch.zeros(1, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)
        placeholders[name] = one.expand(tensor.shape)
        known[one.data_ptr()] = name, tensor, one
    loaded: Any = type(skeleton).from_pretrained(
        None,
        config=config,
        state_dict=placeholders,
        dtype=torch.float32,
        output_loading_info=True,
    )
    module, info = loaded
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"the checkpoint has no usable tensor {absent[0]!r} ({len(absent)} in all), which the "
            "architecture needs"
        )
    module.config._name_or_path = module.name_or_path = str(folder)
    _put(module, known)
    tie(module)
    module.requires_grad_(False).eval()
    stream_weights(module)
    setattr(module, FILES, _files_key(files, config))
    result: nn.Module = module
    return result


def _files_key(files: Sequence[MappedFile], config: Any) -> str:
    """What the weights depend on, as a hash: files by their headers and what the system says.

    The configuration is part of it, as transformers makes the model of it.
    """
    digest = hashlib.sha256(config.to_json_string().encode())
    digest.update(f"{REVISION} {version('transformers')}\n".encode())
    for file in files:
        about = file.path.stat()
        times = f"{about.st_mtime_ns} {about.st_ctime_ns}"  # the second cannot be set
        digest.update(f"{file.path.resolve()} {about.st_ino} {about.st_size} {times}\n".encode())
        digest.update(file.header)
    return digest.hexdigest()


def _put(module: nn.Module, known: Mapping[int, tuple[str, Tensor, Tensor]]) -> None:
    """Put the tensors of the files where their placeholders are.

    Raises:
        ValueError: If one was copied or changed, so that it is not known what it stands for.
    """
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            address = parameter.data_ptr()
            if address not in known or parameter.shape != known[address][1].shape:
                raise ValueError(f"transformers makes {name!r} of it by a conversion of its own")
            tensor = known[address][1]
            if address not in made:
                made[address] = nn.Parameter(tensor, requires_grad=False)
            part._parameters[name] = made[address]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.data_ptr() in known and buffer.numel():
                tensor = known[buffer.data_ptr()][1]
                part._buffers[name] = tensor.to(buffer.dtype, copy=True)


def _fused(skeleton: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with those that the architecture holds together in one under its own name.

    Raises:
        ValueError: If this transformers cannot say how.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(skeleton)
    except ImportError as error:
        raise ValueError(f"this transformers has no table of conversions ({error})") from error
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    if not converters:
        return tensors
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    state = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    jobs: dict[str, Any] = {}
    left: dict[str, Tensor] = {}
    sources: dict[str, list[Tensor]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if pattern is None or target not in state:
            left[key] = tensors[key]
            continue
        job = jobs.setdefault(target, copy.deepcopy(by_pattern[pattern]))
        job.add_tensor(target, key, pattern, _maker(tensors[key]))
        sources.setdefault(target, []).append(tensors[key])
    spill = Spill()
    for target, job in jobs.items():
        for name, tensor in job.convert(target, model=skeleton, config=skeleton.config).items():
            spill.put(name, tensor[0] if isinstance(tensor, list) else tensor)
        for tensor in sources[target]:
            release(tensor)
    return left | spill.tensors()


def _maker(tensor: Tensor) -> Any:
    return lambda: tensor


def streamed_bytes(folder: Path) -> int:
    """Bytes that the weights of a folder take in float32.

    Raises:
        ValueError: If it has no safetensors files.
    """
    entries = [entry for file in mapped_files(folder) for entry in file.entries.values()]
    return sum(4 * (entry.nbytes // entry.dtype.itemsize) for entry in entries)

"""Model -> units: which weight matrices get a format, and which share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .fusion import fuse
from .units import UnitInfo


def weight_matrix(module: nn.Module) -> Tensor | None:
    """The weight of a quantizable module as a matrix [rows, cols], rows = output features.

    A view of the parameter wherever one exists, never a copy. None for all other modules, among
    them subclasses and variants (max_norm, reflected padding) that no packed module stands for.
    """
    if type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None):
        return module.weight
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        return module.weight.flatten(1)
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.T
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the GPT-2 ``Conv1D`` of transformers: a linear layer stored transposed."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D"


def find_units(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> tuple[UnitInfo, ...]:
    """List the units of a model in module order.

    Args:
        model: Any module with Linear, Conv1D, Embedding or Conv2d layers.
        include: Globs on module names; empty means all.
        exclude: Globs on module names that are left as they are.
        groups: Fusion rules such as ``q_proj,k_proj,v_proj``: matrices with these last names
            under one parent share one format, as the runtimes that fuse them require.

    Returns:
        Units whose tied matrices are one entry with aliases, and fused matrices one unit.

    Raises:
        ValueError: If a glob or a rule matches nothing, or no unit is left.
    """
    owners: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    elsewhere = _used_elsewhere(model)
    for name, module in model.named_modules(remove_duplicate=False):
        matrix = weight_matrix(module)
        if matrix is None or (place := _place(module.weight)) in elsewhere:
            continue
        owner = owners.setdefault(place, name)
        if owner == name:
            shapes[name] = (matrix.shape[0], matrix.shape[1])
            aliases[name] = []
        else:
            aliases[owner].append(name)
    if not shapes:
        raise ValueError(
            "The model has no Linear, Conv1D, Embedding or Conv2d layer, so there is nothing to "
            "quantize."
        )
    chosen = [
        name
        for name in shapes
        if (not include or _matches([name, *aliases[name]], include))
        and not _matches([name, *aliases[name]], exclude)
    ]
    _check_globs([*include, *exclude], [n for name in shapes for n in (name, *aliases[name])])
    if not chosen:
        raise ValueError(
            f"--include {' '.join(include) or '*'} without --exclude {' '.join(exclude) or '-'} "
            f"leaves no unit of {len(shapes)}. Loosen the globs."
        )
    stack = _main_stack(chosen)
    units = []
    for name in chosen:
        layer, kind = _locate(name, stack)
        units.append(UnitInfo(name, (name,), (shapes[name],), kind, layer, tuple(aliases[name])))
    for rule in groups:
        fused = fuse(units, rule)
        if len(fused) == len(units):
            raise ValueError(
                f"--group {rule!r} matches nothing: no module has two of these children. "
                f"A layer name looks like {units[0].name!r}."
            )
        units = [unit for unit, _ in fused]
    return tuple(units)


def _place(weight: Any) -> int:
    """What tied weights have in common: their address, or on the meta device the parameter."""
    address: int = weight.data_ptr()
    return address or id(weight)


def _used_elsewhere(model: nn.Module) -> set[int]:
    """Places of weights that a module without a packed counterpart uses too."""
    return {
        _place(parameter)
        for module in model.modules()
        if weight_matrix(module) is None
        for parameter in module.parameters(recurse=False)
    }


def unplanned_tensors(
    model: nn.Module, units: Sequence[UnitInfo]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every saved tensor of a model that is not a unit's weight.

    Returns:
        The tensors by name, shared ones once, and the other names of those: name -> name used.
    """
    planned = {f"{name}.weight" for unit in units for name in (*unit.modules, *unit.aliases)}
    others: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if name in planned:
            continue
        owner = owners.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if owner == name:
            others[name] = tensor
        else:
            tied[name] = owner
    return others, tied


def as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the checkpoint's dtype, or as it is where that would lose something."""
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    return stored if torch.equal(stored.to(tensor.dtype), tensor) else tensor


def _matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _check_globs(globs: Sequence[str], names: Sequence[str]) -> None:
    for glob in globs:
        if not _matches(names, [glob]):
            near = get_close_matches(glob, names, n=1, cutoff=0.3) or names[:1]
            raise ValueError(f"No layer matches {glob!r}. A layer name looks like {near[0]!r}.")


def _split_at_index(name: str) -> tuple[str, int | None, str]:
    """``model.layers.3.mlp.up`` -> (``model.layers``, 3, ``mlp.up``)."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", None, name


def _main_stack(names: Sequence[str]) -> str | None:
    counts = Counter(
        prefix for prefix, index, _ in map(_split_at_index, names) if index is not None
    )
    return counts.most_common(1)[0][0] if counts else None


def _locate(name: str, stack: str | None) -> tuple[int | None, str]:
    prefix, index, rest = _split_at_index(name)
    if index is not None and prefix == stack and rest:
        return index, rest
    return None, name

"""Model -> units: which weight matrices get a format, and which share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .._base.hints import closest
from .coverage import IDLE, Coverage, Left
from .fusion import fuse
from .sites import Place, places
from .sites.experts import expert_of
from .units import Ranges, UnitInfo, by_matrix, part_name, split_rows
from .workload import memory_of


@dataclass(slots=True)
class _Found:
    """A weight with everything that is named after it."""

    place: Place
    aliases: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [self.place.name, *self.aliases]


def find_units(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    groups: Sequence[str] = (),
    per_expert: bool = False,
) -> tuple[UnitInfo, ...]:
    """List the units of a model in module order: every float parameter of two or more dimensions.

    The experts of a layer are one unit per projection, whether they are one parameter or a list
    of modules.

    Args:
        model: Any module.
        include: Globs on weight names; empty means all.
        exclude: Globs on weight names that are left as they are.
        groups: Fusion rules such as ``q_proj,k_proj,v_proj``: matrices with these last names
            under one parent share one format, as the runtimes that fuse them require.
        per_expert: Make every expert a unit of its own.

    Returns:
        Units whose tied matrices are one entry with aliases, and fused matrices one unit.

    Raises:
        ValueError: If a glob or a rule matches nothing, or no unit is left.
    """
    found = _weights(model)
    if not found:
        raise ValueError(
            "The model has no floating point parameter with two or more dimensions, so there is "
            "nothing to quantize."
        )
    chosen = [
        one
        for one in found
        if (not include or _matches(one.names, include)) and not _matches(one.names, exclude)
    ]
    _check_globs([*include, *exclude], [name for one in found for name in one.names])
    if not chosen:
        raise ValueError(
            f"--include {' '.join(include) or '*'} without --exclude {' '.join(exclude) or '-'} "
            f"leaves no unit of {len(found)}. Loosen the globs."
        )
    units = _described(model, chosen, _experts(chosen) if per_expert else {})
    if not per_expert:
        units = _with_experts_together(model, units)
    for rule in groups:
        fused = fuse(units, rule)
        if len(fused) == len(units):
            raise ValueError(
                f"--group {rule!r} matches nothing: no module has two of these children. "
                f"A layer name looks like {units[0].name!r}."
            )
        units = [unit for unit, _ in fused]
    return tuple(units)


def find_matrices(
    model: nn.Module, row_sets: Mapping[str, Ranges] | None = None
) -> tuple[UnitInfo, ...]:
    """List all weights of a model, one unit per matrix, or per part of those that are split.

    Args:
        model: Any module.
        row_sets: The rows of every part that is no whole matrix, by its name ``matrix[rows:k]``;
            those of matrices that are not in the model are ignored.

    Raises:
        ValueError: If parts are not all rows of their matrix, each once.
    """
    return tuple(_described(model, _weights(model), by_matrix(row_sets or {})))


def coverage(
    model: nn.Module,
    units: Sequence[UnitInfo],
    selected: bool = False,
    idle: Collection[str] = (),
) -> Coverage:
    """What part of a model's weights is in units.

    Args:
        model: The model.
        units: Its units.
        selected: Whether the user chose them with globs.
        idle: Weights that are in none since the output does not depend on them.
    """
    planned = {part.module for unit in units for part in unit.parts}
    found = _weights(model)
    sizes = {one.place.name: one.place.parameter.numel() for one in found}
    reason = "left out by --include or --exclude" if selected else "not in the profile"
    left = [
        Left(name, size, IDLE if name in idle else reason)
        for name, size in sizes.items()
        if name not in planned
    ]
    left += [
        Left(name, parameter.numel(), f"{parameter.dtype} weights")
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not parameter.is_floating_point()
    ]
    inside = sum(unit.weights for unit in units)
    return Coverage(inside, inside + sum(one.weights for one in left), tuple(left), selected)


def _weights(model: nn.Module) -> list[_Found]:
    """Every weight once, under its first name."""
    owners: dict[Hashable, _Found] = {}
    for place in places(model):
        known = owners.setdefault(_address(place.parameter), _Found(place))
        if known.place is not place:
            known.aliases.append(place.name)
    return list(owners.values())


def _address(weight: Tensor) -> Hashable:
    """What tied weights have in common: their memory, or on the meta device the parameter."""
    return memory_of(weight) or id(weight)


def _experts(found: Sequence[_Found]) -> dict[str, dict[str, Ranges]]:
    """The rows of every expert of the weights that hold several."""
    split: dict[str, dict[str, Ranges]] = {}
    for place in (one.place for one in found):
        count = place.blocks
        size = place.shape[0] // count
        if count > 1:
            split[place.name] = {
                part_name(place.name, i): ((i * size, (i + 1) * size),) for i in range(count)
            }
    return split


def _described(
    model: nn.Module, found: Sequence[_Found], split: Mapping[str, Mapping[str, Ranges]]
) -> list[UnitInfo]:
    """The unit of every weight; of those to be split, the units of its parts."""
    experts = {one.place.name: expert_of(one.place.path, model) for one in found}
    stack = _main_stack(list(experts))
    units: list[UnitInfo] = []
    for one in found:
        place, name = one.place, one.place.name
        expert = experts[name]
        common = expert[0] + name.removeprefix(place.path) if expert else name
        layer, kind = _locate(common, stack)
        unit = UnitInfo(name, (name,), (place.shape,), kind, layer, tuple(one.aliases))
        units += split_rows(unit, split[name]) if name in split else [unit]
    return units


def _with_experts_together(model: nn.Module, units: Sequence[UnitInfo]) -> list[UnitInfo]:
    """One unit for each matrix that all experts in a list have."""
    together: dict[str, list[UnitInfo]] = {}
    paths = {place.name: place.path for place in places(model)}
    for unit in units:
        expert = expert_of(paths[unit.name], model)
        common = expert[0] + unit.name.removeprefix(paths[unit.name]) if expert else unit.name
        together.setdefault(common, []).append(unit)
    return [
        members[0]
        if len(members) == 1
        else replace(
            members[0],
            name=name,
            modules=tuple(unit.name for unit in members),
            shapes=tuple(unit.shapes[0] for unit in members),
            aliases=tuple(alias for unit in members for alias in unit.aliases),
        )
        for name, members in together.items()
    ]


def unplanned_tensors(
    model: nn.Module, units: Sequence[UnitInfo]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every saved tensor of a model that is not a unit's weight.

    Returns:
        The tensors by name, shared ones once, and the other names of those: name -> name used.
    """
    inside = {part.module for unit in units for part in unit.parts}
    inside |= {alias for unit in units for alias in unit.aliases}
    planned = {place.key for place in places(model) if place.name in inside}
    others: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[Hashable, str] = {}
    for name, tensor in model.state_dict().items():
        if name in planned:
            continue
        memory = memory_of(tensor)
        owner = owners.setdefault(memory, name) if memory else name
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
            near = closest(glob, names, cutoff=0.3) or list(names[:1])
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

"""Fusion rules: which units of a list must share one format. Names only, no model needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .units import UnitInfo, module_kinds


def fuse(units: Sequence[UnitInfo], rule: str) -> list[tuple[UnitInfo, list[int]]]:
    """Apply a rule such as ``q_proj,k_proj,v_proj`` to every parent module that has two of them.

    A unit that is fused already takes part with all its matrices.

    Args:
        units: The units.
        rule: Last names of the modules that share one format.

    Returns:
        Every unit after fusion, at the place of its first member, with the indices of its members
        in ``units``.  As many as before if the rule matches nothing new.

    Raises:
        ValueError: If the rule has fewer than two names.
    """
    suffixes = [part.strip() for part in rule.split(",") if part.strip()]
    if len(suffixes) < 2:
        raise ValueError(f"--group {rule!r} needs at least two names, such as 'q_proj,k_proj'.")
    families: dict[str | int, list[int]] = {}
    for i, unit in enumerate(units):
        parent = _parent(unit, suffixes)
        families.setdefault(i if parent is None else parent, []).append(i)
    fused = []
    for family, members in families.items():
        found = [units[i] for i in members]
        fused.append((found[0] if len(found) == 1 else _merge(found, str(family)), members))
    return fused


def _parent(unit: UnitInfo, suffixes: Sequence[str]) -> str | None:
    """What comes before the suffix in the name of the first module that has one."""
    for module in _labels(unit):
        for suffix in suffixes:
            if module == suffix or module.endswith("." + suffix):
                return module[: -len(suffix)]
    return None


def _labels(unit: UnitInfo) -> tuple[str, ...]:
    """The names of a unit's modules; of the experts in a list, the one that stands for all."""
    return (unit.name,) if "*" in unit.name else unit.modules


def _merge(found: Sequence[UnitInfo], parent: str) -> UnitInfo:
    labels = [label for unit in found for label in _labels(unit)]
    kinds = list(dict.fromkeys(kind for unit in found for kind in module_kinds(unit)))
    first = next(i for i, label in enumerate(labels) if label.startswith(parent))
    kind_parent = kinds[first][: len(kinds[first]) - len(labels[first]) + len(parent)]
    return replace(
        found[0],
        name=_braced(labels, parent),
        modules=tuple(module for unit in found for module in unit.modules),
        shapes=tuple(shape for unit in found for shape in unit.shapes),
        kind=_braced(kinds, kind_parent),
        aliases=tuple(alias for unit in found for alias in unit.aliases),
        rows=tuple(rows for unit in found for rows in unit.row_ranges())
        if any(unit.rows for unit in found)
        else (),
    )


def _braced(names: Sequence[str], parent: str) -> str:
    return f"{parent}{{{','.join(name.removeprefix(parent) for name in names)}}}"

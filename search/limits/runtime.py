"""``--for RUNTIME``: what a runtime can run, in the bytes that it stores."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...models.fusion import fuse
from ...models.units import UnitInfo
from ...quantizers.format import Format
from ...quantizers.runtimes import Rules
from ...sensitivity.table import SensitivityTable, stored_bytes
from ._kinds import LIMITS, Limit, Refusal

if TYPE_CHECKING:
    from . import Limits


class RuntimeRules(Limit):
    """Formats that the kernels of the runtime lack, or lack for a matrix of that shape."""

    def refusals(self, table: SensitivityTable, limits: Limits) -> Iterator[Refusal]:
        """One for all of its rules.

        Raises:
            ValueError: If the table is not as the runtime has it.
        """
        if limits.rules is not None:
            check_for_runtime(table, limits.rules)
            yield Refusal(f"--for {limits.rules.name}", _refused(table, limits.rules), True)


def bytes_for(table: SensitivityTable, rules: Rules) -> NDArray[np.int64]:
    """int64 [U, F], what every unit takes in a file for the runtime."""
    return stored_bytes(table.units, [Format.parse(n) for n in table.formats], rules.stored_bytes)


def check_for_runtime(table: SensitivityTable, rules: Rules) -> None:
    """Raise if a table has other units or bytes than the runtime.

    Raises:
        ValueError: With what it takes to get one that has the same.
    """
    for group in rules.fusion_groups:
        for unit, members in fuse(table.units, group):
            if len(members) > 1:
                raise ValueError(
                    f"{rules.name} runs {unit.name!r} as one matrix with one format, but the table "
                    f"has {len(members)} units for it. Take Limits.for_runtime(table), or profile "
                    f"with --group '{group}'."
                )
    parts = [part.module for unit in table.units for part in unit.parts if part.rows is not None]
    if parts and not rules.row_parts:
        raise ValueError(
            f"{rules.name} takes one format for all rows of a matrix (its rule `row_parts`), but "
            f"the table has {parts.count(parts[0])} parts of {parts[0]!r}. Profile whole matrices: "
            "without --per-expert."
        )
    if not np.array_equal(table.bytes, bytes_for(table, rules)):
        raise ValueError(
            f"The table does not count the bytes that {rules.name} stores. Take "
            "Limits.for_runtime(table)."
        )


def _refused(table: SensitivityTable, rules: Rules) -> NDArray[np.bool_]:
    """bool [U, F], what a runtime does not run; units of one shape are looked at once."""
    formats = [Format.parse(name) for name in table.formats]
    known: dict[tuple[object, bool, str], list[bool]] = {}
    rows = []
    for unit in table.units:
        floating = any(map(rules.must_stay_float, (*unit.modules, *unit.aliases)))
        key = unit.shapes, floating, layer_type(table, unit)
        if key not in known:
            known[key] = [reason(unit, fmt, rules, key[2]) is not None for fmt in formats]
        rows.append(known[key])
    return np.array(rows)


def layer_type(table: SensitivityTable, unit: UnitInfo) -> str:
    """What kind of layer a unit is: ``linear`` unless the profile says otherwise."""
    return (table.provenance.layer_types or {}).get(unit.name, "linear")


def reason(unit: UnitInfo, fmt: Format, rules: Rules, layer: str = "linear") -> str | None:
    """Why a runtime does not run a unit in a format; None if it does."""
    if refused := rules.layer_refusal(fmt, layer):
        return refused
    matrices = [*zip(unit.modules, unit.shapes, strict=True)]
    matrices += [(alias, unit.shapes[0]) for alias in unit.aliases]
    reasons = (rules.refusal(fmt, shape, name) for name, shape in matrices)
    return next(filter(None, reasons), None)


def floor(table: SensitivityTable, rules: Rules, refused: NDArray[np.bool_]) -> str:
    """Why a runtime has no smaller plan, and what to do; empty if no rule is in the way.

    ``refused`` is bool [U, F], what it does not run.
    """
    held: dict[str, str] = {}  # unit -> the glob that keeps it as floats
    for unit in table.units:
        names = (*unit.modules, *unit.aliases)
        if found := [g for g in rules.unquantized if any(fnmatchcase(n, g) for n in names)]:
            held[unit.name] = found[0]
    others = np.array([unit.name not in held for unit in table.units])
    if (stuck := _stuck(table, rules, refused, others)) or not held:
        return stuck
    more = f" and {len(held) - 1:,} more" if len(held) > 1 else ""
    excludes = " ".join(f"--exclude '{glob}'" for glob in dict.fromkeys(held.values()))
    return (
        f"{rules.name} keeps {next(iter(held))!r}{more} at 16 bits or more (its rule "
        f"`unquantized`). Search, or profile, with {excludes}, so that the budget counts only what "
        "is quantized; or raise the budget."
    )


def _stuck(
    table: SensitivityTable,
    rules: Rules,
    refused: NDArray[np.bool_],
    others: NDArray[np.bool_],
) -> str:
    """Why most weights have no format but floats that the runtime runs; empty if they have.

    ``others`` is bool [U], the units that it does not keep as floats anyway.
    """
    formats = [Format.parse(name) for name in table.formats]
    floats = np.array([fmt.floating for fmt in formats])
    weights = np.array([unit.weights for unit in table.units])
    stuck = others & (refused | floats).all(axis=1)
    if floats.all() or 2 * weights[stuck].sum() <= weights[others].sum():
        return ""
    unit = table.units[int(stuck.argmax())]
    layer = layer_type(table, unit)
    reasons = (reason(unit, fmt, rules, layer) for fmt in formats if not fmt.floating)
    return (
        f"{rules.name} runs {stuck.sum():,} of {others.sum():,} units in no smaller format of the "
        f"profile: {unit.name!r} fails its rules ({next(filter(None, reasons))}). Search, or "
        f"profile, with --for {rules.name}, so that the formats it has are measured "
        f"({', '.join(rules.candidates)}), leave such units out with --exclude, or raise the "
        "budget."
    )


LIMITS.register("runtime")(RuntimeRules())

"""Whether a runtime can run a plan, and the nearest plan that it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..models.fusion import fuse
from ..models.units import UnitInfo, matrix_name, whole_matrices
from ..quantizers.format import Format
from ..quantizers.runtimes import Rules
from ..search.plan import Plan


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a plan breaks.

    Attributes:
        unit: Module or fused modules.
        reason: Begins with the name of the rule.
        fix: A format that the runtime takes there, as an instruction.
    """

    unit: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.unit}: {self.reason}. {self.fix}"


def violations(
    units: Sequence[UnitInfo], formats: Mapping[str, Format], rules: Rules
) -> Iterator[Violation]:
    """Every rule that a plan breaks, in the order of the model.

    Args:
        units: All matrices of the model, planned or not, one unit each.
        formats: Canonical module name -> format; what is missing stays as it is.
        rules: The runtime's rules.
    """
    parts: dict[str, list[str]] = {}
    for unit in units:
        if unit.rows and unit.name in formats:
            parts.setdefault(unit.parts[0].module, []).append(unit.name)
    for unit in units:
        fmt = formats.get(unit.name)
        if fmt is None:
            continue
        matrix = unit.parts[0].module
        if matrix in parts and not rules.row_parts:
            if unit.name == parts[matrix][0]:
                widest = max((formats[name] for name in parts[matrix]), key=_fineness(unit))
                listed = ", ".join(dict.fromkeys(formats[name].name for name in parts[matrix]))
                yield Violation(
                    matrix,
                    f"row_parts: it takes one format for all rows of a matrix, but the plan has "
                    f"{len(parts[matrix])} parts of these rows in {listed}",
                    f"Use {(nearest_format(unit, widest, rules) or widest).name} for all rows",
                )
            continue
        reason = _refusal(unit, fmt, rules)
        if reason:
            better = nearest_format(unit, fmt, rules)
            fix = f"Use {better.name} there" if better else "Leave it out of the plan (--exclude)"
            yield Violation(f"{unit.name} in {fmt.name}", reason, fix)
    for group in rules.fusion_groups:
        for fused, members in fuse(units, group):
            chosen = [_name(formats.get(units[i].name)) for i in members]
            if len(set(chosen)) > 1:
                yield Violation(
                    fused.name,
                    f"fused: it runs as one matrix, but the plan has {', '.join(chosen)}",
                    "Give all of them one format",
                )


def check(
    units: Sequence[UnitInfo], formats: Mapping[str, Format], rules: Rules, plan_id: str
) -> None:
    """Refuse a plan that a runtime cannot run.

    Raises:
        ValueError: With the first broken rules and what to do.
    """
    broken = list(violations(units, formats, rules))
    if broken:
        more = f"\n  and {len(broken) - 3:,} more" if len(broken) > 3 else ""
        listed = "".join(f"\n  {violation}." for violation in broken[:3])
        raise ValueError(
            f"{rules.name} cannot run this plan:{listed}{more}\nMake a plan for it (bitplan search "
            f"{plan_id} --for {rules.name}), or round up to what it has with --snap."
        )


def snap(
    units: Sequence[UnitInfo], plan: Plan, formats: Mapping[str, Format], rules: Rules
) -> tuple[Plan, dict[str, str]]:
    """Round formats that a runtime lacks up to the next that it has.

    Fused modules take the widest of what their members were rounded to, and so do all rows of a
    matrix where the runtime has one format for them.

    Args:
        units: All matrices of the model, planned or not, one unit each.
        plan: The plan.
        formats: Its assignments, parsed.
        rules: The runtime's rules.

    Returns:
        The plan, its figures adjusted where they can be, and what changed: name -> new format.

    Raises:
        ValueError: If a unit cannot take any format of the runtime, or nothing is left to quantize.
    """
    new = dict(formats)
    if not rules.row_parts and any(unit.rows for unit in units):
        for unit in units:
            if unit.rows and unit.name in new:
                name, own = unit.parts[0].module, new.pop(unit.name)
                new[name] = max(new.get(name, own), own, key=_fineness(unit))
        units = whole_matrices(units)
    for unit in units:
        fmt = new.get(unit.name)
        if fmt is not None and _refusal(unit, fmt, rules):
            new[unit.name] = _must(nearest_format(unit, fmt, rules), unit, rules)
    for group in rules.fusion_groups:
        for _, members in fuse(units, group):
            planned = [units[i] for i in members if units[i].name in new]
            if len(planned) < len(members):  # one is left as it is: so must be the others
                for unit in planned:
                    del new[unit.name]
            elif len({new[unit.name] for unit in planned}) > 1:
                widest = max((new[unit.name] for unit in planned), key=_fineness(planned[0]))
                for unit in planned:
                    new[unit.name] = widest
    if not new:
        raise ValueError(
            f"Rounded up for {rules.name}, the plan quantizes nothing: it leaves out modules that "
            "run as one with those it has. Plan all of them."
        )
    changed = {
        name: _name(new.get(name, new.get(matrix_name(name))))
        for name in formats
        if new.get(name) != formats[name]
    }
    return (_rounded(plan, new, units, rules) if changed else plan, changed)


def _rounded(
    plan: Plan, formats: Mapping[str, Format], units: Sequence[UnitInfo], rules: Rules
) -> Plan:
    """The plan for a runtime: its bytes counted there, measurements and predictions dropped."""
    shapes = {unit.name: unit.shapes[0] for unit in units}
    weights = sum(rows * cols for rows, cols in (shapes[name] for name in formats))
    size = sum(rules.stored_bytes(fmt, shapes[name]) for name, fmt in formats.items())
    unknown = float("nan")
    return plan.model_copy(
        update={
            "assignments": {name: fmt.name for name, fmt in formats.items()},
            "row_sets": {name: rows for name, rows in plan.row_sets.items() if name in formats},
            "bytes": size,
            "weights": weights,
            "bpw": 8 * size / weights,
            "predicted_kl": unknown,
            "predicted_kl_stderr": unknown,
            "lower_bound_kl": unknown,
            "gap": unknown,
            "measured": None,
            "measured_also": [],
            "baselines": [],
            "refinement": None,
            "runtime": rules.name,
            "note": "; ".join(filter(None, (plan.note, f"rounded up for {rules.name}"))),
        }
    )


def nearest_format(unit: UnitInfo, fmt: Format, rules: Rules) -> Format | None:
    """The format a runtime takes for a unit that is closest to ``fmt`` from above.

    The fewest bits that are not fewer; of those one that is asymmetric if ``fmt`` is, of the same
    family (integers, blocks), the nearest group size, the fewest bytes.
    """
    taken = [f for f in rules.all_formats() if not _refusal(unit, f, rules) and f.bits >= fmt.bits]
    shape = unit.shapes[0]

    def distance(other: Format) -> tuple[int, bool, bool, float, int]:
        groups = other.groups(shape[1]) / fmt.groups(shape[1])
        return (
            other.bits,
            other.symmetric != fmt.symmetric,
            other.family != fmt.family,
            max(groups, 1 / groups),
            rules.stored_bytes(other, shape),
        )

    return min(taken, key=distance, default=None)


def _fineness(unit: UnitInfo) -> Callable[[Format], tuple[int, int, bool]]:
    """What sorts formats of a unit from narrow to wide."""
    cols = unit.shapes[0][1]
    return lambda fmt: (fmt.bits, fmt.groups(cols), not fmt.symmetric)


def _must(fmt: Format | None, unit: UnitInfo, rules: Rules) -> Format:
    if fmt is None:
        raise ValueError(f"{rules.name} takes no format for {unit.name!r}: leave it out.")
    return fmt


def _refusal(unit: UnitInfo, fmt: Format, rules: Rules) -> str | None:
    names = (unit.name, *unit.aliases)
    return next(filter(None, (rules.refusal(fmt, unit.shapes[0], name) for name in names)), None)


def _name(fmt: Format | None) -> str:
    return fmt.name if fmt else "(as it is)"

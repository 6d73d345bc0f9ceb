"""Everything that restricts a search besides bytes: which formats a unit may take, and costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..kernels.latency import Device
from ..models.fusion import fuse
from ..models.units import UnitInfo
from ..quantizers.format import Format
from ..quantizers.runtimes import Rules
from ..sensitivity.table import SensitivityTable, stored_bytes
from .costs import (
    LatencyTable,
    bit_operations,
    measured_milliseconds,
    predicted_milliseconds,
    read_latency,
)
from .matching import format_index, nearest, unit_names
from .plan import Latency
from .problem import Constraint, Problem

_BARE = re.compile(r"int([1-8])")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may not do, besides taking too many bytes.

    Globs match unit, module or alias names, and kinds (``mlp.up_proj``: that matrix of every
    layer); a glob on one module of a fused unit means the unit.

    Attributes:
        formats: The formats that units without a pin may take; None for all of the profile.
        pins: Glob -> the only format; later pins override earlier ones.
        bans: Glob -> globs on formats that must not be taken.
        at_least: Glob -> the least bits per code, as a format: ``int6`` allows int6, int8, bf16.
        at_most: Glob -> the most bits per code.
        groups: Modules that share one format, as ``--group`` writes them: ``q_proj,k_proj``.
        max_bops: Most bit operations per token; see :func:`costs.bit_operations`.
        latency: Measured milliseconds, or the JSON file that holds them.
        device: The device whose latency model gives milliseconds instead.
        tokens: Vectors that a product on the device takes at a time: the batch.
        max_ms: Most milliseconds of all units together; needs ``latency`` or ``device``.
        rules: What the runtime the plan is for can run: ``Rules.load("vllm")``.
    """

    formats: tuple[str, ...] | None = None
    pins: Mapping[str, str] = field(default_factory=dict)
    bans: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    at_least: Mapping[str, str] = field(default_factory=dict)
    at_most: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    max_bops: float | None = None
    latency: Path | LatencyTable | None = None
    device: Device | None = None
    tokens: int = 1
    max_ms: float | None = None
    rules: Rules | None = None

    def __post_init__(self) -> None:
        """Check what needs no table.

        Raises:
            ValueError: If there is a limit on time but nothing that says how long anything takes,
                or more than one thing that does.
        """
        if self.latency is not None and self.device is not None:
            raise ValueError(
                "--latency holds measured times and --latency-device predicts them: give one."
            )
        if self.max_ms is not None and not self.timed:
            raise ValueError(
                "--max-ms needs times: --latency-device such as h100, or a --latency table."
            )

    @property
    def timed(self) -> bool:
        """Whether it is known how long anything takes."""
        return self.latency is not None or self.device is not None

    def milliseconds(
        self, table: SensitivityTable, allowed: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Time of every option that is allowed: float64 [U, F].

        Raises:
            ValueError: If one has no time.
        """
        if self.device is not None:
            fused = self.rules is not None
            return predicted_milliseconds(table, allowed, self.device, self.tokens, fused)
        assert self.latency is not None
        times = self.latency
        if isinstance(times, Path):
            times = read_latency(times)
        return measured_milliseconds(table, allowed, times)

    def latency_of(self, table: SensitivityTable, choice: NDArray[np.intp]) -> Latency | None:
        """What a choice [U] takes; None if nothing says how long anything takes."""
        if not self.timed:
            return None
        rows = np.arange(len(choice))
        chosen = np.zeros(table.kl.shape, dtype=bool)
        chosen[rows, choice] = True
        measured = str(self.latency) if isinstance(self.latency, Path) else "a table"
        return Latency(
            ms=round(float(self.milliseconds(table, chosen)[rows, choice].sum()), 6),
            tokens=self.tokens,
            device=self.device.title if self.device else measured,
            sureness=self.device.sureness if self.device else "measured",
            max_ms=self.max_ms,
        )

    def for_runtime(self, table: SensitivityTable) -> SensitivityTable:
        """The table as the runtime has it: the bytes it stores, its units fused and the groups'.

        Raises:
            ValueError: If a group matches nothing.
        """
        for rule in self.groups:
            _check_group(table, rule)
        if self.rules is None:
            return table.merged(self.groups)
        fused = table.merged((*self.groups, *self.rules.fusion_groups))
        return replace(fused, bytes=_bytes_for(fused, self.rules))


def build_problem(table: SensitivityTable, limits: Limits) -> Problem:
    """Turn a table and limits into arrays; format indices stay those of the table.

    Raises:
        ValueError: If a glob matches nothing, a format is unknown, the table is not as the runtime
            has it (``Limits.for_runtime``), a time is missing, or a unit is left without a format.
    """
    problem = Problem.from_table(table, limits.pins, limits.formats)
    if limits.rules:
        _check_for_runtime(table, limits.rules)
    refusals = list(_refusals(table, limits))
    allowed = problem.allowed.copy()
    for refusal in refusals:
        allowed &= ~refusal.mask
    closed = np.flatnonzero(~allowed.any(axis=1))
    if len(closed):
        raise ValueError(_why_closed(table, limits, closed, problem.allowed, refusals))
    return replace(
        problem,
        loss=np.where(allowed, problem.loss, np.inf),
        constraints=tuple(_constraints(table, limits, allowed)),
        floor=_floor(table, limits.rules, refusals[-1].mask) if limits.rules else "",
    )


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A limit as the user wrote it, and the options it refuses: bool [U, F]."""

    text: str
    mask: NDArray[np.bool_]


def _refusals(table: SensitivityTable, limits: Limits) -> Iterator[_Refusal]:
    names = unit_names(table.units)
    for glob, patterns in limits.bans.items():
        units = names.find(glob, "--ban")
        for pattern in patterns:
            banned = _matching_formats(table, pattern)
            yield _Refusal(f"--ban '{glob}={pattern}'", units[:, None] & banned)
    for glob, name in limits.at_least.items():
        low = _widths(table) < _bits(table, name)
        yield _Refusal(f"--min '{glob}={name}'", names.find(glob, "--min")[:, None] & low)
    for glob, name in limits.at_most.items():
        high = _widths(table) > _bits(table, name)
        yield _Refusal(f"--max '{glob}={name}'", names.find(glob, "--max")[:, None] & high)
    if limits.rules:
        yield _Refusal(f"--for {limits.rules.name}", _refused(table, limits.rules))


def _matching_formats(table: SensitivityTable, pattern: str) -> NDArray[np.bool_]:
    found = np.array([fnmatchcase(name, pattern) for name in table.formats])
    if pattern == "keep":
        found[format_index(table, pattern)] = True
    if not found.any():
        raise ValueError(
            f"--ban {pattern!r} matches no format of the profile.{nearest(pattern, table.formats)} "
            f"It has {', '.join(table.formats)}."
        )
    return found


def _widths(table: SensitivityTable) -> NDArray[np.int64]:
    """int64 [F], bits per code of every format."""
    return np.array([Format.parse(name).bits for name in table.formats], dtype=np.int64)


def _bits(table: SensitivityTable, name: str) -> int:
    """Bits per code of ``int6``, of a format, or of the checkpoint's own dtype (``keep``)."""
    if match := _BARE.fullmatch(name):
        return int(match[1])
    return Format.parse(table.formats[format_index(table, name)] if name == "keep" else name).bits


def _check_group(table: SensitivityTable, rule: str) -> None:
    names = {part.strip() for part in rule.split(",")}
    fused = [sum(m.rpartition(".")[2] in names for m in unit.modules) > 1 for unit in table.units]
    if len(fuse(table.units, rule)) == len(table.units) and not any(fused):
        raise ValueError(
            f"--group {rule!r} matches nothing: no module has two of these children. "
            f"A layer name looks like {table.units[0].name!r}."
        )


def _bytes_for(table: SensitivityTable, rules: Rules) -> NDArray[np.int64]:
    """int64 [U, F], what every unit takes in a file for the runtime."""
    return stored_bytes(table.units, [Format.parse(n) for n in table.formats], rules.stored_bytes)


def _check_for_runtime(table: SensitivityTable, rules: Rules) -> None:
    for group in rules.fusion_groups:
        for unit, members in fuse(table.units, group):
            if len(members) > 1:
                raise ValueError(
                    f"{rules.name} runs {unit.name!r} as one matrix with one format, but the table "
                    f"has {len(members)} units for it. Take Limits.for_runtime(table), or profile "
                    f"with --group '{group}'."
                )
    if not np.array_equal(table.bytes, _bytes_for(table, rules)):
        raise ValueError(
            f"The table does not count the bytes that {rules.name} stores. Take "
            "Limits.for_runtime(table)."
        )


def _refused(table: SensitivityTable, rules: Rules) -> NDArray[np.bool_]:
    """bool [U, F], what a runtime does not run; units of one shape are looked at once."""
    formats = [Format.parse(name) for name in table.formats]
    known: dict[tuple[object, bool], list[bool]] = {}
    rows = []
    for unit in table.units:
        key = unit.shapes, any(map(rules.must_stay_float, (*unit.modules, *unit.aliases)))
        if key not in known:
            known[key] = [_reason(unit, fmt, rules) is not None for fmt in formats]
        rows.append(known[key])
    return np.array(rows)


def _reason(unit: UnitInfo, fmt: Format, rules: Rules) -> str | None:
    """Why a runtime does not run a unit in a format; None if it does."""
    matrices = [*zip(unit.modules, unit.shapes, strict=True)]
    matrices += [(alias, unit.shapes[0]) for alias in unit.aliases]
    reasons = (rules.refusal(fmt, shape, name) for name, shape in matrices)
    return next(filter(None, reasons), None)


def _floor(table: SensitivityTable, rules: Rules, refused: NDArray[np.bool_]) -> str:
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
    reasons = (_reason(unit, fmt, rules) for fmt in formats if not fmt.floating)
    return (
        f"{rules.name} runs {stuck.sum():,} of {others.sum():,} units in no smaller format of the "
        f"profile: {unit.name!r} fails its rules ({next(filter(None, reasons))}). Search, or "
        f"profile, with --for {rules.name}, so that the formats it has are measured "
        f"({', '.join(rules.candidates)}), leave such units out with --exclude, or raise the "
        "budget."
    )


def _why_closed(
    table: SensitivityTable,
    limits: Limits,
    closed: NDArray[np.intp],
    before: NDArray[np.bool_],
    refusals: Sequence[_Refusal],
) -> str:
    """What leaves the first of the closed units without a format, and what to do.

    Args:
        table: The sensitivity table.
        limits: The limits.
        closed: intp, the units without a format.
        before: bool [U, F], what profile, formats and pins leave.
        refusals: The other limits.
    """
    u = int(closed[0])
    unit = table.units[u]
    left = [name for name, open_ in zip(table.formats, before[u], strict=True) if open_]
    parts = [f"{_origin(table, limits, u)} leaves {', '.join(left)}"]
    for refusal in refusals:
        hit = [table.formats[f] for f in np.flatnonzero(refusal.mask[u] & before[u])]
        if hit:
            parts.append(f"{refusal.text} refuses {', '.join(hit)}")
    fix = "Drop or loosen one of these"
    rules = limits.rules
    if rules and (refusals[-1].mask[u] & before[u]).any():
        reasons = [_reason(unit, Format.parse(name), rules) for name in left]
        parts[-1] += f" ({'; '.join(dict.fromkeys(filter(None, reasons)))})"
        offered = dict.fromkeys((*rules.candidates, *rules.floats))
        taken = [n for n in offered if n != "keep" and not _reason(unit, Format.parse(n), rules)]
        fix = (
            f"Profile {unit.name!r} in a format that {rules.name} takes there ({', '.join(taken)})"
        )
    others = f" So are {len(closed) - 1:,} more." if len(closed) > 1 else ""
    return (
        f"Unit {unit.name!r} is left without a format: {', '.join(parts)}.{others} "
        f"{fix}, or profile without it (--exclude {unit.modules[0]!r})."
    )


def _origin(table: SensitivityTable, limits: Limits, u: int) -> str:
    """What decides which formats a unit has before the other limits."""
    names = unit_names(table.units)
    pins = [f"--pin '{g}={f}'" for g, f in limits.pins.items() if names.find(g, "--pin")[u]]
    if pins:
        return pins[-1]
    return "the profile" if limits.formats is None else f"--formats {','.join(limits.formats)}"


def _constraints(
    table: SensitivityTable, limits: Limits, allowed: NDArray[np.bool_]
) -> Iterator[Constraint]:
    if limits.max_bops is not None:
        yield bit_operations(table, limits.max_bops)
    if limits.timed:
        cost = limits.milliseconds(table, allowed)  # without a limit too: what lacks a time is told
        if limits.max_ms is not None:
            yield Constraint("latency", cost, float(limits.max_ms), "ms", "--max-ms")


def parse_assignments(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Read texts like ``GLOB=FORMAT``; of equal globs the last counts.

    >>> parse_assignments("--pin", ["lm_head=int6-g64-asym"])
    {'lm_head': 'int6-g64-asym'}

    Raises:
        ValueError: If a text has no ``=`` or nothing on one side of it.
    """
    parsed = {}
    for text in texts:
        glob, _, name = (part.strip() for part in text.partition("="))
        if not glob or not name:
            raise ValueError(
                f"{option} {text!r} is not GLOB=FORMAT, such as 'lm_head=int6-g64-asym'."
            )
        parsed[glob] = name
    return parsed


def parse_bans(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read texts like ``GLOB=FORMAT,FORMAT``, whose formats may be globs; equal globs add up.

    >>> parse_bans(["lm_head=int2*,int3*", "lm_head=int4-gc"])
    {'lm_head': ('int2*', 'int3*', 'int4-gc')}

    Raises:
        ValueError: As for :func:`parse_assignments`.
    """
    bans: dict[str, tuple[str, ...]] = {}
    for text in texts:
        for glob, names in parse_assignments("--ban", [text]).items():
            patterns = (part.strip() for part in names.split(","))
            bans[glob] = (*bans.get(glob, ()), *(part for part in patterns if part))
    return bans


def refused_options(table: SensitivityTable, limits: Limits) -> list[tuple[str, NDArray[np.bool_]]]:
    """Every limit on formats as the user wrote it, and the options it refuses: bool [U, F].

    Raises:
        ValueError: As for :func:`build_problem`.
    """
    found = []
    if limits.formats is not None:
        outside = ~np.isin(
            table.formats, [table.formats[format_index(table, n)] for n in limits.formats]
        )
        found.append(
            (f"--formats {','.join(limits.formats)}", np.tile(outside, (len(table.units), 1)))
        )
    names = unit_names(table.units)
    for glob, name in limits.pins.items():
        others = np.arange(len(table.formats)) != format_index(table, name)
        found.append((f"--pin '{glob}={name}'", names.find(glob, "--pin")[:, None] & others))
    return found + [(refusal.text, refusal.mask) for refusal in _refusals(table, limits)]

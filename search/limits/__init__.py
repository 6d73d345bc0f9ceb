"""Everything that restricts a search besides bytes, one file per kind of limit.

A kind either refuses options or bounds a sum of costs (:class:`._kinds.Limit`); a new one is a new
file here, which finds its value in ``Limits.others``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.latency import Device
from ...models.fusion import fuse
from ...quantizers.format import Format
from ...quantizers.runtimes import Rules
from ...sensitivity.table import SensitivityTable
from ..matching import format_index, unit_names
from ..plan import Latency
from ..problem import Constraint, Problem
from ._kinds import LIMITS, Refusal
from .latency import LatencyTable, measured_milliseconds, predicted_milliseconds, read_latency
from .runtime import bytes_for, floor, layer_type, reason


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
        others: Values of further kinds of limits, by the name of their plug-in.
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
    others: Mapping[str, Any] = field(default_factory=dict)

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
        return replace(fused, bytes=bytes_for(fused, self.rules))


def build_problem(table: SensitivityTable, limits: Limits) -> Problem:
    """Turn a table and limits into arrays; format indices stay those of the table.

    Raises:
        ValueError: If a glob matches nothing, a format is unknown, the table is not as the runtime
            has it (``Limits.for_runtime``), a time is missing, or a unit is left without a format.
    """
    problem = Problem.from_table(table, limits.pins, limits.formats)
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
        floor=_floor(table, limits, refusals),
    )


def _refusals(table: SensitivityTable, limits: Limits) -> Iterator[Refusal]:
    for name in limits.others:
        LIMITS.get(name)  # raises if there is no such kind
    for name in LIMITS.names():
        yield from LIMITS.get(name).refusals(table, limits)


def _constraints(
    table: SensitivityTable, limits: Limits, allowed: NDArray[np.bool_]
) -> Iterator[Constraint]:
    for name in LIMITS.names():
        yield from LIMITS.get(name).constraints(table, limits, allowed)


def _floor(table: SensitivityTable, limits: Limits, refusals: Sequence[Refusal]) -> str:
    """Why the runtime has no smaller plan, and what to do; empty if no rule is in the way."""
    masks = [refusal.mask for refusal in refusals if refusal.runtime]
    return floor(table, limits.rules, masks[0]) if limits.rules and masks else ""


def _check_group(table: SensitivityTable, rule: str) -> None:
    names = {part.strip() for part in rule.split(",")}
    fused = [sum(m.rpartition(".")[2] in names for m in unit.modules) > 1 for unit in table.units]
    if len(fuse(table.units, rule)) == len(table.units) and not any(fused):
        raise ValueError(
            f"--group {rule!r} matches nothing: no module has two of these children. "
            f"A layer name looks like {table.units[0].name!r}."
        )


def _why_closed(
    table: SensitivityTable,
    limits: Limits,
    closed: NDArray[np.intp],
    before: NDArray[np.bool_],
    refusals: Sequence[Refusal],
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
    if rules and any(r.runtime and (r.mask[u] & before[u]).any() for r in refusals):
        layer = layer_type(table, unit)
        reasons = [reason(unit, Format.parse(name), rules, layer) for name in left]
        parts[-1] += f" ({'; '.join(dict.fromkeys(filter(None, reasons)))})"
        offered = dict.fromkeys((*rules.candidates, *rules.floats))
        given = {name: Format.parse(name) for name in offered if name != "keep"}
        taken = [n for n, fmt in given.items() if not reason(unit, fmt, rules, layer)]
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

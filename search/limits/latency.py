"""``--max-ms``: time, measured or predicted for a device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, TypeAdapter, ValidationError

from ..._base.files import read_json_text
from ..._base.records import first_fault
from ...kernels.latency import Device
from ...models.units import module_kinds
from ...quantizers.format import Format
from ...sensitivity.table import SensitivityTable
from ..matching import Names
from ..problem import Constraint
from ._kinds import LIMITS, Limit

if TYPE_CHECKING:
    from . import Limits

LatencyTable = Mapping[str, Mapping[str, float]]  # unit or glob -> format or glob -> milliseconds

_TABLE = TypeAdapter(dict[str, dict[str, NonNegativeFloat]])
_GLOB, _KIND, _NAME = 0, 2, 4  # how specific a pattern is; a format named exactly adds one


class Time(Limit):
    """The most milliseconds of all units together."""

    def constraints(
        self, table: SensitivityTable, limits: Limits, allowed: NDArray[np.bool_]
    ) -> Iterator[Constraint]:
        """One, if there is a limit; without one, too, an option that has no time is told.

        Raises:
            ValueError: If an allowed option has no time.
        """
        if limits.timed:
            cost = limits.milliseconds(table, allowed)
            if limits.max_ms is not None:
                yield Constraint("latency", cost, float(limits.max_ms), "ms", "--max-ms")


def read_latency(path: Path) -> LatencyTable:
    """Read ``{"unit or glob": {"format or glob": milliseconds}}``.

    Raises:
        ValueError: If the file is missing, is not JSON, or holds anything else.
    """
    if not path.is_file():
        raise ValueError(
            f"No latency table at {path}. Give a JSON file of milliseconds by layer and format, or "
            "--latency-device."
        )
    try:
        return _TABLE.validate_python(json.loads(read_json_text(path, "latency table")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    except ValidationError as error:
        raise ValueError(
            f"{path} is no latency table: {first_fault(error)}. Write "
            '{"unit or glob": {"format or glob": milliseconds}}.'
        ) from error


def predicted_milliseconds(
    table: SensitivityTable,
    allowed: NDArray[np.bool_],
    device: Device,
    tokens: int,
    fused: bool,
) -> NDArray[np.float64]:
    """Time of every option on a device, by its latency model: float64 [U, F], whole nanoseconds.

    Every matrix is one product with ``tokens`` vectors, its parts together if they are multiplied
    at once: each has a share of the launch by its rows.  Embeddings that are only looked up, as the
    profile recorded, take no time.  A convolution counts once, as if it had one output position.

    Args:
        table: The sensitivity table.
        allowed: bool [U, F], the options that need a time.
        device: The device.
        tokens: Vectors at a time.
        fused: Whether the matrices of a fused unit are run as one.

    Raises:
        ValueError: If the device's kernel does not run an allowed format.
    """
    formats = {f: Format.parse(name) for f, name in enumerate(table.formats) if allowed[:, f].any()}
    for fmt in formats.values():
        try:
            device.seconds(fmt, (1, 1), tokens)
        except ValueError as error:
            raise ValueError(
                f"{fmt} cannot be timed on {device.title}: {error} Leave it out of --formats, or "
                "choose another kernel."
            ) from error

    def launch(fmt: Format, share: float) -> float:
        return (share if device.one_launch(fmt) else 1.0) * device.overhead(fmt)

    @cache
    def times(shapes: tuple[tuple[int, int], ...], share: float) -> list[float]:
        seconds = (
            sum(device.seconds(fmt, s, tokens, overhead=launch(fmt, share)) for s in shapes)
            for fmt in formats.values()
        )
        return [math.ceil(1e9 * value) / 1e6 for value in seconds]

    rows: dict[str, int] = {}  # of every matrix in parts
    for part in (part for unit in table.units for part in unit.parts if part.rows is not None):
        rows[part.module] = rows.get(part.module, 0) + part.shape[0]
    types = table.provenance.layer_types
    cost = np.zeros(table.kl.shape)
    for u, unit in enumerate(table.units):
        shapes = unit.shapes
        part = unit.parts[0]
        single = len(shapes) == 1 and part.rows is not None
        share = part.shape[0] / rows[part.module] if single else 1.0
        if fused and len({cols for _, cols in shapes}) == 1:
            shapes = ((sum(rows for rows, _ in shapes), shapes[0][1]),)
        if types.get(unit.name) != "embedding":
            cost[u, list(formats)] = times(shapes, share)
    return cost


def measured_milliseconds(
    table: SensitivityTable, allowed: NDArray[np.bool_], times: LatencyTable
) -> NDArray[np.float64]:
    """Time of every option, from a table of measured times: float64 [U, F].

    A pattern names modules by name, alias, kind or glob.  The most specific entry counts: a name
    over a kind over a glob, then a format's name over a glob, then the later one.  A fused unit
    takes the time of an entry that names it (or its kind) whole, otherwise the sum over its
    modules.

    Args:
        table: The sensitivity table.
        allowed: bool [U, F], the options that need a time.
        times: The measured times.

    Raises:
        ValueError: If a pattern matches nothing, or an allowed option has no time.
    """
    parts = [
        (u, (module, *(unit.aliases if len(unit.modules) == 1 else ())), kind)
        for u, unit in enumerate(table.units)
        for module, kind in zip(unit.modules, module_kinds(unit), strict=True)
    ]
    fused = [u for u, unit in enumerate(table.units) if len(unit.modules) > 1]
    wholes = [(u, (table.units[u].name,), table.units[u].kind) for u in fused]
    found, level = _look_up([*parts, *wholes], table.formats, times)
    cost = np.zeros(table.kl.shape)
    np.add.at(cost, [u for u, _, _ in parts], found[: len(parts)])
    named = level[len(parts) :] >= _KIND
    cost[fused] = np.where(named, found[len(parts) :], cost[fused])
    gaps = allowed & np.isnan(cost)
    if gaps.any():
        u, f = (int(i) for i in np.argwhere(gaps)[0])
        raise ValueError(
            f"The latency table has no time for {table.units[u].name!r} in {table.formats[f]} "
            f"({gaps.sum():,} such gaps). Add an entry, or one for '*' as the default."
        )
    return np.nan_to_num(cost)


def _look_up(
    rows: Sequence[tuple[int, tuple[str, ...], str]], formats: Sequence[str], times: LatencyTable
) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Milliseconds [R, F] of rows (unit, names, kind), NaN without an entry, and how specific."""
    everything = Names([(*names, kind) for _, names, kind in rows])
    by_name = Names([names for _, names, _ in rows])
    by_kind = Names([(kind,) for _, _, kind in rows])
    found = np.full((len(rows), len(formats)), np.nan)
    level = np.full(found.shape, -1, dtype=np.int8)
    for pattern, entries in times.items():
        matched = everything.find(pattern, "--latency")
        specific = np.where(by_kind.exact(pattern), _KIND, _GLOB)
        specific = np.where(by_name.exact(pattern), _NAME, specific)
        for fmt, milliseconds in entries.items():
            columns = np.array([name == fmt or fnmatchcase(name, fmt) for name in formats])
            if not (columns.any() or set(fmt) & set("*?[")):
                Format.parse(fmt)  # one that was not profiled is fine, a misspelt one is not
            rank = specific + np.array([name == fmt for name in formats])[:, None]
            taken = matched & columns[:, None] & (rank >= level.T)
            found.T[taken] = milliseconds
            level.T[taken] = rank[taken]
    return found, level


LIMITS.register("latency")(Time())

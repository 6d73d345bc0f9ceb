"""The numbers of a report, without any drawing: tests check these, never pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.units import UnitInfo
from ..models.wording import words_of
from ..sensitivity.table import SensitivityTable
from .run import RunData, unit_bytes

BOUND_SAMPLES = 512
REFERENCE_BPW = 4.3  # where formats start to hurt, and where most plans live
MIXED = "mixed"


class Curve(NamedTuple):
    """KL in nats per token against size, ascending in size; every array is [P]."""

    megabytes: NDArray[np.float64]
    bpw: NDArray[np.float64]
    kl: NDArray[np.float64]


class Point(NamedTuple):
    """One plan in the frontier figure.

    ``name`` is the format of a uniform plan, and ``stderr`` None for a prediction.
    """

    name: str
    megabytes: float
    bpw: float
    kl: float
    stderr: float | None = None
    uniform: bool = False


class FrontierData(NamedTuple):
    """What ``frontier.png`` shows.

    Attributes:
        frontier: The predicted frontier: one point per plan.
        bound: The lower bound of the linear-programming relaxation at the bytes of every plan of
            the frontier and at evenly spaced budgets.
        uniform: Predicted KL of giving every unit the same format.
        measured: Measured uniform plans and other baselines.
        plan: The plan, predicted.
        plan_measured: The plan, measured; None before validation.
        budget_megabytes: The budget the plan was made for.
        weights: Weights in scope; ``bpw = 8e6 * megabytes / weights``.
        nats: The unit of KL: ``nats per token``, or per what else the model predicts.
    """

    frontier: Curve
    bound: Curve
    uniform: tuple[Point, ...]
    measured: tuple[Point, ...]
    plan: Point
    plan_measured: Point | None
    budget_megabytes: float
    weights: int
    nats: str


def frontier_data(run: RunData) -> FrontierData:
    """Predicted frontier, lower bound, uniform plans and measurements of a run."""
    plan, weights = run.plan, run.table.weights

    def curve(nbytes: NDArray[np.int64], kl: NDArray[np.float64]) -> Curve:
        return Curve(nbytes / 1e6, 8 * nbytes / weights, kl)

    def point(
        name: str, nbytes: int, kl: float, stderr: float | None = None, uniform: bool = False
    ) -> Point:
        return Point(name, nbytes / 1e6, 8 * nbytes / weights, kl, stderr, uniform)

    nbytes, kl = run.frontier.points()
    # The bound is straight between the plans, but a straight line is a curve on a log axis.
    between = np.linspace(nbytes[0], nbytes[-1], BOUND_SAMPLES).astype(np.int64)
    budgets = np.union1d(nbytes, between)
    bound = np.interp(budgets, nbytes, kl)
    measured = plan.measured
    return FrontierData(
        frontier=curve(nbytes, kl),
        bound=curve(budgets, bound),
        uniform=tuple(point(*entry, uniform=True) for entry in run.frontier.uniform),
        # Baselines with a KV cache count its bytes: they are not on the axis of the weights.
        measured=()
        if plan.kv_cache
        else tuple(
            point(b.format or b.name, b.bytes, b.kl, b.kl_stderr, b.format is not None)
            for b in plan.baselines
        ),
        plan=point("plan", plan.bytes, plan.predicted_kl),
        plan_measured=None
        if measured is None
        else point("plan", plan.bytes, measured.kl, measured.kl_stderr),
        budget_megabytes=(plan.bytes if plan.kv_cache else plan.budget.bytes) / 1e6,
        weights=weights,
        nats=words_of(plan.calibration).nats,
    )


def size_unit(megabytes: float) -> tuple[str, float]:
    """The unit in which a size reads well, and its megabytes."""
    units = (("GB", 1e3), ("MB", 1.0), ("kB", 1e-3), ("B", 1e-6))
    return next((unit for unit in units if megabytes >= 2 * unit[1]), units[-1])


class Check(NamedTuple):
    """A prediction and its measurement, nats per token.

    ``name`` is the format of a uniform plan, and ``predicted_stderr`` 0 if unknown.
    """

    name: str
    predicted: float
    predicted_stderr: float
    measured: float
    stderr: float
    uniform: bool = False


class PredictionData(NamedTuple):
    """What ``prediction.png`` shows: the plan first, then every plan measured beside it."""

    checks: tuple[Check, ...]
    nats: str


def prediction_data(run: RunData) -> PredictionData:
    """Predicted against measured KL of everything a run measured; no checks if it did not."""
    plan, measured = run.plan, run.plan.measured
    nats = words_of(plan.calibration).nats
    if measured is None:
        return PredictionData((), nats)
    own = Check(
        "this plan", plan.predicted_kl, plan.predicted_kl_stderr, measured.kl, measured.kl_stderr
    )
    others = (
        Check(b.format or b.name, b.predicted_kl, 0.0, b.kl, b.kl_stderr, b.format is not None)
        for b in plan.baselines
    )
    return PredictionData((own, *others), nats)


class UnitValue(NamedTuple):
    """One number of one unit that lies outside the repeated layers."""

    name: str
    format: str
    value: float
    stderr: float = 0.0


class UnitGrid(NamedTuple):
    """A number for every matrix kind (rows) in every layer (columns), and for the other units.

    Attributes:
        layers: Layer indices, ascending, [L].
        kinds: Matrix kinds in the order of the model, [K].
        values: float64 [K, L]; NaN where there is no unit, or none with a price.
        formats: Format of each cell, K tuples of L; "" where there is no unit, ``mixed`` where
            several units share a cell (experts) and differ.
        others: Units without a layer, in the order of the model.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    values: NDArray[np.float64]
    formats: tuple[tuple[str, ...], ...]
    others: tuple[UnitValue, ...]


def allocation_data(run: RunData) -> UnitGrid:
    """Bits per weight of everything stored, 8 * bytes / weights, and the format, per unit."""

    def bits(rows: Sequence[int]) -> float:
        units = [run.table.units[row] for row in rows]
        return 8 * sum(unit_bytes(run, unit) for unit in units) / sum(u.weights for u in units)

    formats = [run.format_of(unit) for unit in run.table.units]
    return _unit_grid(run.table.units, formats, bits)


class SensitivityData(NamedTuple):
    """What ``sensitivity.png`` shows.

    Attributes:
        format: The format all units are compared in.
        kl: Predicted KL of storing only this unit in ``format``, nats per token.
        density: The same per million weights of the unit.
        nats: The unit of KL.
    """

    format: str
    kl: UnitGrid
    density: UnitGrid
    nats: str


def sensitivity_data(run: RunData) -> SensitivityData:
    """Predicted KL of every unit in one reference format, whole and per million weights."""
    table, reference = run.table, reference_format(run.table)
    column = table.formats.index(reference)
    kl, stderr = table.kl[:, column], table.stderr[:, column]
    millions = np.array([unit.weights for unit in table.units]) / 1e6

    def total(rows: Sequence[int]) -> float:
        return float(kl[rows].sum())

    def density(rows: Sequence[int]) -> float:
        return float(kl[rows].sum() / millions[rows].sum())

    formats = [reference] * len(table.units)
    return SensitivityData(
        format=reference,
        kl=_unit_grid(table.units, formats, total, stderr),
        density=_unit_grid(table.units, formats, density, stderr / millions),
        nats=words_of(run.plan.calibration).nats,
    )


def reference_format(table: SensitivityTable) -> str:
    """The format nearest to 4.3 bits per weight among those priced for the most units."""
    priced = (~np.isnan(table.kl)).sum(axis=0)

    def distance(name: str) -> float:
        return abs(8 * table.uniform_bytes(name) / table.weights - REFERENCE_BPW)

    everywhere = [n for n, count in zip(table.formats, priced, strict=True) if count == max(priced)]
    return min(everywhere, key=distance)


def _unit_grid(
    units: Sequence[UnitInfo],
    formats: Sequence[str],
    value: Callable[[Sequence[int]], float],
    stderr: NDArray[np.float64] | None = None,
) -> UnitGrid:
    """Arrange ``value(rows of the units in a cell)`` by kind and layer."""
    cells: dict[tuple[str, int], list[int]] = {}
    others = []
    for row, unit in enumerate(units):
        if unit.layer is None:
            error = 0.0 if stderr is None else float(stderr[row])
            others.append(UnitValue(unit.name, formats[row], value([row]), error))
        else:
            cells.setdefault((unit.kind, unit.layer), []).append(row)
    kinds = tuple(dict.fromkeys(kind for kind, _ in cells))
    layers = tuple(sorted({layer for _, layer in cells}))

    def cell_format(rows: Sequence[int]) -> str:
        names = {formats[row] for row in rows}
        return MIXED if len(names) > 1 else "".join(names)

    def cell_value(rows: Sequence[int]) -> float:
        return value(rows) if rows else math.nan

    grid = [[cells.get((kind, layer), []) for layer in layers] for kind in kinds]
    return UnitGrid(
        layers=layers,
        kinds=kinds,
        values=np.array([[cell_value(rows) for rows in line] for line in grid], dtype=np.float64),
        formats=tuple(tuple(cell_format(rows) for rows in line) for line in grid),
        others=tuple(others),
    )


class FormatShare(NamedTuple):
    """How much of a model a format holds; shares are fractions of the weights and the bytes."""

    format: str
    units: int
    weights: float
    bytes: float


def format_shares(run: RunData) -> list[FormatShare]:
    """Every format of the plan, from the fewest bits per weight to the most."""
    shares: dict[str, list[tuple[int, int]]] = {}
    for unit in run.table.units:
        shares.setdefault(run.format_of(unit), []).append((unit.weights, unit_bytes(run, unit)))
    return sorted(
        (
            FormatShare(
                name,
                len(units),
                sum(weights for weights, _ in units) / run.table.weights,
                sum(nbytes for _, nbytes in units) / run.plan.bytes,
            )
            for name, units in shares.items()
        ),
        key=lambda share: share.bytes / share.weights,
    )


class UnitRow(NamedTuple):
    """One line of the allocation table; KL in nats per token, None without a price.

    ``nearest`` is what the format would cost with weights rounded to nearest.
    """

    name: str
    shape: str
    format: str
    bpw: float
    bytes: int
    kl: float | None
    kl_stderr: float | None
    nearest: float | None = None


def unit_rows(run: RunData) -> list[UnitRow]:
    """Format, size and predicted KL of every unit, in the order of the model."""
    rows = []
    for index, unit in enumerate(run.table.units):
        name, nbytes = run.format_of(unit), unit_bytes(run, unit)
        kl = stderr = None
        if name in run.table.formats:
            column = run.table.formats.index(name)
            kl, stderr = float(run.table.kl[index, column]), float(run.table.stderr[index, column])
        shape = " + ".join(f"{out} × {inputs}" for out, inputs in unit.shapes)
        bpw = 8 * nbytes / unit.weights
        nearest = run.plan.nearest_kl.get(unit.name)
        rows.append(UnitRow(unit.name, shape, name, bpw, nbytes, kl, stderr, nearest))
    return rows

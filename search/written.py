"""A choice written down as a plan, with where its prices came from."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from ..sensitivity.table import SensitivityTable
from .coverage import coverage_of, model_sizes
from .hull import lower_hull
from .plan import BudgetRef, KVCache, Latency, Plan, RowSet
from .problem import Problem, Solution

SEARCH_PACKAGES = (
    "bitplan",
    "numpy",
    "scipy",
    "pulp",
    "optuna",
)  # versions that decide what a solver returns


def plan_from_choice(
    table: SensitivityTable,
    choice: NDArray[np.intp],
    solver: str,
    *,
    goal: str = "budget",
    lower_bound: float | None = None,
    budget: BudgetRef | None = None,
    kv_cache: KVCache | None = None,
    resident_bytes: int | None = None,
    latency: Latency | None = None,
    runtime: str | None = None,
    note: str | None = None,
    command: str | None = None,
) -> Plan:
    """Write a choice down as a plan, with where its prices came from.

    Args:
        table: The table that was solved.
        choice: intp [U], index into ``table.formats`` of every unit.
        solver: Name of what made the choice, such as ``certified``.
        goal: What was asked for: the name of a file in ``search/goals``.
        lower_bound: No plan within the budget is predicted below this KL (nats per token); by
            default the LP bound over all formats of the table.
        budget: The budget as text and bytes; by default the plan's own bytes.
        kv_cache: The KV cache that shares the budget; its KL is added.
        resident_bytes: Bytes of the weights as a device holds them, if those are limited.
        latency: Time of the plan, if known.
        runtime: The runtime whose rules the plan keeps.
        note: What the solver had to say.
        command: The command line to record.

    Raises:
        ValueError: If a unit has no price in its format, or the table does not say which model,
            metric, rounding and calibration its prices are for.
    """
    problem = Problem.from_table(table)
    size, loss = (a[np.arange(len(choice)), choice] for a in (problem.bytes, problem.loss))
    if np.isinf(loss).any():
        u = int(np.isinf(loss).argmax())
        raise ValueError(
            f"Unit {table.units[u].name!r} has no measured price in "
            f"{table.formats[int(choice[u])]!r}; choose another format or profile it."
        )
    budget = budget or BudgetRef(text=f"{size.sum()}B", bytes=int(size.sum()))
    if lower_bound is None:
        lower_bound = lower_hull(problem).relax(problem, budget.bytes).bound
    weights = problem.evaluate(choice, np.inf)
    predicted = weights.loss + (kv_cache.predicted_kl if kv_cache else 0.0)
    solution = Solution(choice, predicted, weights.bytes, min(lower_bound, predicted))
    origin = table.provenance
    origin.require_complete()
    whole, original = model_sizes(table, solution.bytes)
    return Plan(
        model=origin.model,
        assignments={
            part.name: table.formats[f]
            for unit, f in zip(table.units, choice.tolist(), strict=True)
            for part in unit.parts
        },
        row_sets={
            part.name: RowSet(module=part.module, rows=list(part.rows))
            for unit in table.units
            for part in unit.parts
            if part.rows is not None
        },
        goal=goal,
        budget=budget,
        bytes=solution.bytes,
        weights=table.weights,
        bpw=8 * solution.bytes / table.weights,
        model_bytes=whole,
        original_bytes=original,
        coverage=coverage_of(table),
        predicted_kl=solution.loss,
        predicted_kl_stderr=predicted_kl_stderr(table, choice),
        lower_bound_kl=solution.lower_bound,
        gap=solution.gap,
        metric=origin.metric,
        solver=solver,
        rounding=origin.rounding,
        calibration=origin.calibration,
        evidence=origin.evidence,
        fold=origin.fold,
        resident_bytes=resident_bytes,
        latency=latency,
        runtime=runtime,
        kv_cache=kv_cache,
        note=note,
        versions=origin.versions | {name: version(name) for name in SEARCH_PACKAGES},
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def predicted_kl_stderr(table: SensitivityTable, choice: NDArray[np.intp]) -> float:
    """Standard error of a choice's predicted KL over calibration sequences, nats per token.

    With per-sequence scores s: the spread of sum_u s_u^2 between sequences, which includes how
    units move together.  Without: the units' own standard errors, as if independent.
    """
    units = np.arange(len(table.units))
    if table.scores is None or len(table.scores) < 2:
        return float(np.sqrt((table.stderr[units, choice] ** 2).sum()))
    chosen = table.scores[:, units, choice].astype(np.float64)
    totals = (chosen**2).sum(axis=1)
    return float(totals.std(ddof=1) / math.sqrt(len(totals)))

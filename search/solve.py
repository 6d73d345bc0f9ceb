"""From a sensitivity table and a budget to a plan."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..sensitivity.table import SensitivityTable
from .budget import Budget
from .fastest import NEEDS_OF_FASTEST
from .fastest import fastest as fastest_plan
from .hull import lower_hull
from .limits import Limits, build_problem
from .plan import BudgetRef, KVCache, Latency, Plan
from .problem import Problem, Solution
from .solvers import SOLVERS

SEARCH_PACKAGES = (
    "bitplan",
    "numpy",
    "scipy",
    "pulp",
    "optuna",
)  # versions that decide what a solver returns


def solve(
    table: SensitivityTable | Path | str,
    budget: Budget | str | int | None,
    *,
    solver: str = "certified",
    pins: Mapping[str, str] | None = None,
    formats: Sequence[str] | None = None,
    limits: Limits | None = None,
    max_kl: float | None = None,
    fastest: bool = False,
    seed: int = 0,
    command: str | None = None,
) -> Plan:
    """Find the plan with the least predicted KL within a budget.

    Args:
        table: A sensitivity table, or the path of a saved profile.
        budget: Such as ``"4.3bpw"``, ``"750MB"``, a Budget, or a number of bytes; None for the
            fastest plan of any size.
        solver: Name of the solver; ``bitplan solvers`` lists them.
        pins: Glob on unit or module names -> the only format they may take; ``keep`` means the
            checkpoint's own dtype, here and in ``formats``.
        formats: The formats that units without a pin may take; all of the table by default.
        limits: Further limits, instead of ``pins`` and ``formats``.
        max_kl: Predicted KL that the ``bisection`` solver aims for, nats per token.
        fastest: Find the fastest plan with at most ``max_kl`` instead; needs ``limits`` with a
            device or a table of times.
        seed: For solvers that draw random numbers.
        command: The command line to record in the plan.

    Returns:
        The plan.  When the budget exceeds the largest useful plan, that one, with a UserWarning.

    Raises:
        ValueError: If the budget cannot be read or is below the smallest plan, a solver, pin or
            format is unknown, or the fastest plan was asked for without target or times.
    """
    if budget is None and not fastest:
        raise ValueError("A budget is missing, such as '4.3bpw'.")
    if isinstance(budget, int):
        budget = f"{budget}B"
    parsed = budget if isinstance(budget, Budget) else Budget.parse(budget or "1000bpw")
    if not isinstance(table, SensitivityTable):
        table = SensitivityTable.load(Path(table))
    max_bytes = parsed.resolve(table.weights, outside_bytes(table, parsed))
    if limits is None:
        limits = Limits(formats=None if formats is None else tuple(formats), pins=pins or {})
    table = limits.for_runtime(table)
    problem = build_problem(table, limits)
    if fastest:
        if max_kl is None or not limits.timed:
            raise ValueError(NEEDS_OF_FASTEST.format("--max-kl"))
        solver = "fastest"
        time = limits.milliseconds(table, problem.allowed)
        solution = fastest_plan(problem, max_bytes, time, max_kl, seed=seed)
    else:
        problem = replace(problem, max_loss=math.inf if max_kl is None else max_kl)
        solution = SOLVERS.get(solver)(problem, max_bytes, seed=seed)
        warn_of_spare_bytes(problem, max_bytes)
    asked = BudgetRef(text=parsed.text, bytes=max_bytes)
    if budget is None:
        asked = BudgetRef(text=f"KL <= {max_kl:g}, fastest", bytes=solution.bytes)
    latency = limits.latency_of(table, solution.choice)
    if fastest and latency is not None:
        latency = latency.model_copy(update={"max_ms": latency.ms})
    return plan_from_choice(
        table,
        solution.choice,
        solver,
        lower_bound=solution.lower_bound,
        budget=asked,
        latency=latency,
        runtime=limits.rules.name if limits.rules else None,
        note=solution.note or None,
        command=command,
    )


def write_program(table: SensitivityTable, budget: Budget, limits: Limits, path: Path) -> None:
    """Write the integer program of a profile and a budget as ``.lp`` or ``.mps``.

    Raises:
        ValueError: As :func:`solve`, or for another suffix.
    """
    from .solvers.ilp import write_ilp  # loads PuLP

    table = limits.for_runtime(table)
    max_bytes = budget.resolve(table.weights, outside_bytes(table, budget))
    write_ilp(build_problem(table, limits), max_bytes, path)


def warn_of_spare_bytes(problem: Problem, max_bytes: int) -> None:
    """Warn if the budget is more than any plan can make use of."""
    most = problem.evaluate(problem.best_choice(), math.inf).bytes
    if max_bytes > most:
        warnings.warn(
            f"The budget of {max_bytes:,} B is above the largest useful plan "
            f"({problem.describe_bytes(most)}): more bytes would not lower the predicted KL.",
            stacklevel=3,
        )


def plan_from_choice(
    table: SensitivityTable,
    choice: NDArray[np.intp],
    solver: str,
    *,
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
    return Plan(
        model=origin.model,
        assignments={
            module: table.formats[f]
            for unit, f in zip(table.units, choice.tolist(), strict=True)
            for module in unit.modules
        },
        budget=budget,
        bytes=solution.bytes,
        weights=table.weights,
        bpw=8 * solution.bytes / table.weights,
        predicted_kl=solution.loss,
        predicted_kl_stderr=predicted_kl_stderr(table, choice),
        lower_bound_kl=solution.lower_bound,
        gap=solution.gap,
        metric=origin.metric,
        solver=solver,
        rounding=origin.rounding,
        calibration=origin.calibration,
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


def outside_bytes(table: SensitivityTable, budget: Budget) -> int:
    """Bytes of the written model file outside the units; only ``file:`` budgets need them."""
    if budget.kind != "file":
        return 0
    outside = table.provenance.outside_bytes
    if outside is None:
        raise ValueError(
            f"The budget {budget.text!r} counts the whole file, but this profile does not record "
            "the bytes outside its units. Profile again, or give the budget of the units alone, "
            "such as '4.3bpw'."
        )
    return outside

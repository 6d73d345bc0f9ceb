"""From a sensitivity table and a budget to a plan."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..sensitivity.table import SensitivityTable
from .budget import Budget
from .coverage import check_coverage, outside_bytes
from .fastest import NEEDS_OF_FASTEST
from .fastest import fastest as fastest_plan
from .limits import Limits, build_problem
from .plan import BudgetRef, Plan
from .problem import Problem
from .solvers import SOLVERS, abilities
from .written import plan_from_choice


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
        The plan.  When the budget exceeds the largest useful plan, that one, with a UserWarning;
        with one, too, when much of the model is not in the table's units.

    Raises:
        ValueError: If the budget cannot be read or is below the smallest plan, or is one per
            weight and the table's units hold too few of the model's weights; a solver, pin or
            format is unknown; or the fastest plan was asked for without target or times.
    """
    if budget is None and not fastest:
        raise ValueError("A budget is missing, such as '4.3bpw'.")
    if isinstance(budget, int):
        budget = f"{budget}B"
    parsed = budget if isinstance(budget, Budget) else Budget.parse(budget or "1000bpw")
    if not isinstance(table, SensitivityTable):
        table = SensitivityTable.load(Path(table))
    check_coverage(table, None if budget is None else parsed, stacklevel=3)
    max_bytes = parsed.resolve(table.weights, outside_bytes(table, parsed))
    if limits is None:
        limits = Limits(formats=None if formats is None else tuple(formats), pins=pins or {})
    table = limits.for_runtime(table)
    problem = build_problem(table, limits)
    goal = "budget"
    if fastest:
        goal = "speed"
        if max_kl is None or not limits.timed:
            raise ValueError(NEEDS_OF_FASTEST.format("--max-kl"))
        solver = "fastest"
        time = limits.milliseconds(table, problem.allowed)
        solution = fastest_plan(problem, max_bytes, time, max_kl, seed=seed)
    else:
        if abilities(solver).seeks_target:
            goal = "quality"
        problem = replace(problem, max_loss=math.inf if max_kl is None else max_kl)
        solution = SOLVERS.get(solver)(problem, max_bytes, seed=seed)
        warn_of_spare_bytes(problem, max_bytes)
    asked = BudgetRef(text=parsed.text, bytes=max_bytes)
    if budget is None:
        asked = BudgetRef(text=f"KL <= {max_kl:g}, fastest", bytes=solution.bytes, kind="target")
    latency = limits.latency_of(table, solution.choice)
    if fastest and latency is not None:
        latency = latency.model_copy(update={"max_ms": latency.ms})
    return plan_from_choice(
        table,
        solution.choice,
        solver,
        goal=goal,
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

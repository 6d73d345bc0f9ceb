"""From a sensitivity table and a budget to a plan."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..sensitivity.table import SensitivityTable
from .budget import Budget
from .hull import lower_hull
from .plan import BudgetRef, ModelRef, Plan
from .problem import Problem
from .solvers import SOLVERS

SEARCH_PACKAGES = ("bitplan", "numpy", "pulp")  # versions that decide what a solver returns


def solve(
    table: SensitivityTable | Path | str,
    budget: Budget | str | int,
    *,
    solver: str = "certified",
    pins: Mapping[str, str] | None = None,
    formats: Sequence[str] | None = None,
    seed: int = 0,
    command: str | None = None,
) -> Plan:
    """Find the plan with the least predicted KL within a budget.

    Args:
        table: A sensitivity table, or the path of a saved profile.
        budget: Such as ``"4.3bpw"``, ``"750MB"``, a Budget, or a number of bytes.
        solver: Name of the solver: ``certified``, ``ilp``, ``uniform`` or a plugin.
        pins: Glob on unit or module names -> the only format they may take; ``keep`` means the
            checkpoint's own dtype, here and in ``formats``.
        formats: The formats that units without a pin may take; all of the table by default.
        seed: For solvers that draw random numbers.
        command: The command line to record in the plan.

    Returns:
        The plan.  When the budget exceeds the largest useful plan, that one, with a UserWarning.

    Raises:
        ValueError: If the budget cannot be read or is below the smallest plan, or a solver, pin
            or format is unknown.
    """
    if not isinstance(table, SensitivityTable):
        table = SensitivityTable.load(Path(table))
    budget = budget if isinstance(budget, Budget) else Budget.parse(str(budget))
    max_bytes = budget.resolve(table.weights, _outside_bytes(table, budget))
    problem = Problem.from_table(table, pins, formats)
    solution = SOLVERS.get(solver)(problem, max_bytes, seed=seed)
    most = problem.evaluate(problem.best_choice(), math.inf).bytes
    if max_bytes > most:
        warnings.warn(
            f"The budget of {max_bytes:,} B is above the largest useful plan "
            f"({problem.describe_bytes(most)}): more bytes would not lower the predicted KL.",
            stacklevel=2,
        )
    return plan_from_choice(
        table,
        solution.choice,
        solver,
        lower_bound=solution.lower_bound,
        budget=BudgetRef(text=budget.text, bytes=max_bytes),
        command=command,
    )


def plan_from_choice(
    table: SensitivityTable,
    choice: NDArray[np.intp],
    solver: str,
    *,
    lower_bound: float | None = None,
    budget: BudgetRef | None = None,
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
    solution = problem.evaluate(choice, lower_bound)
    provenance = _checked_provenance(table)
    return Plan(
        model=ModelRef.model_validate(provenance["model"]),
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
        metric=provenance["metric"],
        solver=solver,
        rounding=provenance["rounding"],
        calibration=provenance["calibration"],
        versions=provenance["versions"] | {name: version(name) for name in SEARCH_PACKAGES},
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


def _checked_provenance(table: SensitivityTable) -> dict[str, Any]:
    needed = ("model", "metric", "rounding", "calibration", "versions")
    missing = [key for key in needed if key not in table.provenance]
    if missing:
        raise ValueError(
            f"The sensitivity table does not record its {', '.join(missing)}, which a plan must "
            "state. Profile again, or fill in SensitivityTable.provenance."
        )
    return table.provenance


def _outside_bytes(table: SensitivityTable, budget: Budget) -> int:
    """Bytes of the written model file outside the units; only ``file:`` budgets need them."""
    if budget.kind != "file":
        return 0
    if "outside_bytes" not in table.provenance:
        raise ValueError(
            f"The budget {budget.text!r} counts the whole file, but this profile does not record "
            "the bytes outside its units. Profile again, or give the budget of the units alone, "
            "such as '4.3bpw'."
        )
    return int(table.provenance["outside_bytes"])

"""The baseline every plan must beat: the best single format that fits."""

from __future__ import annotations

from ..hull import lower_hull
from ..problem import Problem, Solution
from . import SOLVERS


@SOLVERS.register("uniform")
def uniform(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Give every unit the same format; of those that fit, the one with the least loss.

    Units pinned to one format keep it.  The lower bound is that of the mixed-format LP, so the
    gap says what uniform precision gives away.

    Args:
        problem: The table as arrays.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic.

    Raises:
        ValueError: If no single format fits.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> plan = uniform(toy_problem(), max_bytes=160)
        >>> plan.choice.tolist(), plan.bytes, plan.loss
        ([1, 1, 1, 1], 128, 0.05859375)
    """
    problem.require_bytes_only("uniform")
    problem.check_feasible(max_bytes)
    choices = [problem.uniform_choice(f) for f in range(len(problem.formats))]
    plans = [problem.evaluate(choice, float("inf")) for choice in choices if choice is not None]
    if not plans:
        raise ValueError(
            "No single format is allowed for every unit. Use the 'certified' solver, or allow "
            "one format everywhere."
        )
    fitting = [plan for plan in plans if plan.bytes <= max_bytes]
    if not fitting:
        least = min(plan.bytes for plan in plans)
        raise ValueError(
            f"No single format fits in {max_bytes:,} B; the smallest uniform plan takes "
            f"{problem.describe_bytes(least)}. Raise the budget or use the 'certified' solver."
        )
    best = min(fitting, key=lambda plan: (plan.loss, plan.bytes))
    bound = lower_hull(problem).relax(problem, max_bytes).bound
    return problem.evaluate(best.choice, bound)

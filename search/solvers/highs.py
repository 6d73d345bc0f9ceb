"""Branch and cut with HiGHS, for several limits at once."""

from __future__ import annotations

import numpy as np

from ..conflicts import explain_infeasible
from ..hull import lower_hull
from ..problem import Problem, Solution
from ..program import Program
from . import SOLVERS

MAX_GAP = 1e-5
SMALLEST_OPTIMUM = 1e-6  # of the range of losses: what is below may be rounding of an optimum of 0


@SOLVERS.register("highs", exact=True, limits=True, mixed_rows=True)
def highs(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Solve with all constraints at once by branch and cut (HiGHS), with a bound.

    The LP relaxation gives the scale of the objective, then the 0/1 program is solved to a
    relative gap of MAX_GAP.  Bytes are counted exactly, whatever HiGHS tolerates.  When the time
    limit ends a search, the gap says how far it got.

    Args:
        problem: The table as arrays, with its constraints.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic unless time runs out.

    Raises:
        ValueError: If no choice is within all limits; says which conflict and by how much.

    References:
        Huangfu and Hall (2018), "Parallelizing the dual revised simplex method", Mathematical
        Programming Computation.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> plan = highs(toy_problem(), max_bytes=112)
        >>> plan.choice.tolist(), plan.bytes, plan.loss, plan.gap
        ([1, 0, 1, 1], 104, 0.17578125, 0.0)
    """
    problem.check_feasible(max_bytes)
    program = Program.build(problem, max_bytes)
    relaxed = program.minimize(problem.loss, whole=False)
    found = None
    if relaxed is not None:
        losses = problem.loss[program.options]
        least = np.where(program.options, problem.loss, np.inf).min(axis=1)
        typical = max(relaxed.bound - float(least.sum()), SMALLEST_OPTIMUM * float(np.ptp(losses)))
        found = program.minimize(problem.loss, max_gap=MAX_GAP, typical=typical)
    if found is None:
        raise ValueError(explain_infeasible(problem, max_bytes))
    bound = lower_hull(problem).relax(problem, max_bytes).bound
    return problem.evaluate(found.choice, max(bound, found.bound))

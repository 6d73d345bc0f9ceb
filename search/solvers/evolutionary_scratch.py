"""The evolutionary search without a loss table: what measuring alone reaches."""

from __future__ import annotations

import numpy as np

from ..levels import Ladder
from ..problem import Problem, Solution
from . import SOLVERS
from .evolutionary import evolve


@SOLVERS.register("evolutionary_scratch", needs_oracle=True)
def evolutionary_scratch(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Search on measured KL like `evolutionary`, from the largest uniform plan that fits.

    Nothing of the table is used but the bytes: bytes that the uniform plan leaves are spent on
    random units.  If no uniform plan fits, the smallest plan takes its place.

    Args:
        problem: The bytes and the oracle.
        max_bytes: The most bytes the plan may take.
        seed: Draws the start, the mutations and the sequences of the early stages.

    Raises:
        ValueError: As `evolutionary` does.

    References:
        Sieberling et al. (2024), "EvoPress: Accurate Dynamic Model Compression via Evolutionary
        Search", arXiv 2410.14649.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> problem = toy_problem(oracle_plans=64)  # its oracle contradicts the table
        >>> plan = evolutionary_scratch(problem, max_bytes=112)
        >>> plan.choice.tolist(), plan.loss, round(problem.oracle.mean_kl(plan.choice), 3)
        ([1, 1, 1, 0], 0.29296875, 0.176)
    """
    problem.check_feasible(max_bytes)
    ladder = Ladder.build(problem)
    uniform = [problem.uniform_choice(f) for f in range(len(problem.formats))]
    levels = [ladder.level(choice) for choice in uniform if choice is not None]
    levels = [level for level in levels if ladder.size(level) <= max_bytes]
    start = max(levels, key=ladder.size, default=np.zeros(len(problem.units), dtype=np.intp))
    order = np.random.default_rng(seed).permutation(len(start))
    order = order[start[order] < ladder.top[order]]
    start = ladder.climb(start, order, start[order], max_bytes)
    return evolve(problem, ladder.choice(start), max_bytes, seed)

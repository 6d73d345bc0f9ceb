"""The null control without prices: random upgrades until the bytes are spent."""

from __future__ import annotations

import numpy as np

from ..hull import lower_hull
from ..levels import Ladder
from ..problem import Problem, Solution
from . import SOLVERS


@SOLVERS.register("random")
def random(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Null control: upgrade units at random, blind to losses, until no upgrade fits.

    From the smallest formats, units drawn uniformly without regard to size or loss go up to their
    next larger format as long as that fits; so the bytes are spent as with any other solver.

    Args:
        problem: The table as arrays.
        max_bytes: The most bytes the plan may take.
        seed: Decides the order of the upgrades.

    Raises:
        ValueError: If even the smallest plan does not fit, or there are further constraints.

    References:
        Li and Talwalkar (2019), "Random search and reproducibility for neural architecture
        search", UAI: a search must beat random choices of equal cost.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> [random(toy_problem(), max_bytes=160, seed=seed).loss for seed in range(3)]
        [0.312652587890625, 0.0235748291015625, 0.57037353515625]
    """
    problem.require_bytes_only("random")
    problem.check_feasible(max_bytes)
    ladder = Ladder.build(problem)
    keys = np.random.default_rng(seed).random((len(ladder.top), len(problem.formats) - 1))
    steps = np.arange(keys.shape[1]) < ladder.top[:, None]
    unit, below = np.nonzero(steps)
    keys = np.sort(np.where(steps, keys, np.inf), axis=1)  # a unit's steps keep their order
    order = keys[unit, below].argsort()
    lowest = np.zeros_like(ladder.top)
    choice = ladder.choice(ladder.climb(lowest, unit[order], below[order], max_bytes))
    return problem.evaluate(choice, lower_hull(problem).relax(problem, max_bytes).bound)

"""Marginal analysis: the upgrade with the best return, again and again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..hull import lower_hull, undominated
from ..levels import Ladder
from ..problem import Problem, Solution
from . import SOLVERS


@SOLVERS.register("greedy", mixed_rows=True)
def greedy(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Start small and keep taking the upgrade that removes the most loss per byte.

    An upgrade moves a unit to its next larger undominated format, so a poor step may hide a good
    one behind it; steps along the convex hull (``certified``) see past it.

    Args:
        problem: The table as arrays.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic.

    Raises:
        ValueError: If even the smallest plan does not fit, or there are further constraints.

    References:
        Fox (1966), "Discrete optimization via marginal analysis", Management Science.  Used for
        bits by AIMET's automatic mixed precision (which walks down from the largest plan) and
        Tai et al. (2024), "MPTQ-ViT: mixed-precision post-training quantization for vision
        transformers", arXiv 2401.14895.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> plan = greedy(toy_problem(), max_bytes=112)
        >>> plan.choice.tolist(), plan.bytes, plan.loss, plan.lower_bound
        ([1, 0, 1, 1], 104, 0.17578125, 0.13671875)
    """
    problem.require_bytes_only("greedy")
    problem.check_feasible(max_bytes)
    hull = lower_hull(problem)
    choice = upgrade(problem, hull.start, max_bytes)
    return problem.evaluate(choice, hull.relax(problem, max_bytes).bound)


def upgrade(problem: Problem, choice: NDArray[np.intp], max_bytes: int) -> NDArray[np.intp]:
    """intp [U], ``choice`` [U] after all single-step upgrades that fit, best return first.

    A step that does not fit stops its unit.  A dominated format is first replaced by the best one
    of no more bytes.

    A step is taken once all steps before it in its unit are, so the order of steps is that of the
    least return on the way: one sort instead of a heap.
    """
    kept = undominated(problem.bytes, problem.loss)
    ladder = Ladder.build(replace(problem, loss=np.where(kept, problem.loss, np.inf)))
    rows = np.arange(len(choice))
    level = (ladder.bytes <= problem.bytes[rows, choice][:, None]).sum(axis=1) - 1
    loss = np.take_along_axis(problem.loss, ladder.format, axis=1)
    unit, step = np.nonzero(np.arange(loss.shape[1] - 1) < ladder.top[:, None])
    gain = loss[unit, step] - loss[unit, step + 1]
    slope = np.full((loss.shape[0], loss.shape[1] - 1), np.inf)
    slope[unit, step] = gain / (ladder.bytes[unit, step + 1] - ladder.bytes[unit, step])
    slope[np.arange(slope.shape[1]) < level[:, None]] = np.inf
    least = np.minimum.accumulate(slope, axis=1)
    ahead = step >= level[unit]
    unit, step = unit[ahead], step[ahead]
    order = np.lexsort((unit, -least[unit, step]))  # stable: a unit's equal steps stay in order
    return ladder.choice(ladder.climb(level, unit[order], step[order], max_bytes))

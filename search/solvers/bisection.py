"""A quality target instead of a budget: the fewest bytes that reach it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..hull import Hull, lower_hull
from ..problem import Problem, Solution
from . import SOLVERS
from .certified import certified


@SOLVERS.register("bisection", seeks_target=True)
def bisection(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Find the smallest plan of at most a given predicted KL, by bisection over budgets.

    The least loss within a budget never rises with the budget, so the least budget that reaches
    the target is found by halving an interval: below the bytes at which the LP bound meets the
    target no plan can reach it, and every trial is a solve with ``certified``, the first at the
    next whole step of the LP frontier.

    Args:
        problem: The table as arrays, with ``max_loss``.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic.

    Returns:
        The plan.  Its ``lower_bound`` is on the loss of all plans of no more bytes than its own;
        its note says below how many bytes no plan reaches the target.

    Raises:
        ValueError: If no target is set, no plan within ``max_bytes`` reaches it, even the
            smallest plan does not fit, or there are further constraints.

    References:
        Burden and Faires, "Numerical analysis": bisection.  The search for the fewest bits that
        keep a quality floor is that of Wang et al. (2019), "HAQ: hardware-aware automated
        quantization with mixed precision", CVPR, with its accuracy-guaranteed objective.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> problem = toy_problem()  # its quality target is 0.25 nats
        >>> plan = bisection(problem, max_bytes=256)
        >>> plan.bytes, plan.loss
        (96, 0.234375)
        >>> plan.note
        'No plan of less than 96 B has a loss of 0.25 nats or less.'
    """
    problem.require_bytes_only("bisection")
    problem.check_feasible(max_bytes)
    target = problem.max_loss
    if not target < np.inf:
        raise ValueError(
            "The 'bisection' solver looks for the smallest plan of a given quality and needs one: "
            "give --max-kl (Problem.max_loss) in nats, such as 0.05."
        )
    best = certified(problem, max_bytes)
    if best.loss > target:
        raise ValueError(
            f"No plan within {max_bytes:,} B has a loss of {target:g} nats or less: the "
            f"best one reaches {best.loss:.6g}, and none can be below {best.lower_bound:.6g}. "
            "Raise the budget, accept more loss (--max-kl), or add formats with more bits."
        )
    least, probe = _bracket(problem, lower_hull(problem), target)
    low, open_from = least, None
    while low < best.bytes:
        found = certified(problem, min(probe, best.bytes - 1))
        if found.loss <= target:
            best = found
        else:
            if found.lower_bound <= target:  # not proven that nothing reaches the target here
                open_from = least if open_from is None else open_from
            low = min(probe, best.bytes - 1) + 1
        probe = (low + best.bytes) // 2
    proven = best.bytes if open_from is None else open_from
    note = f"No plan of less than {proven:,} B has a loss of {target:g} nats or less."
    return replace(best, note=note)


def _bracket(problem: Problem, hull: Hull, target: float) -> tuple[int, int]:
    """Bytes below which the LP bound exceeds ``target``, and the next whole step of the hull."""
    start = problem.evaluate(hull.start, np.inf)
    size = start.bytes + np.append(0, hull.bytes.cumsum())
    loss = start.loss - np.append(0.0, hull.gain.cumsum())
    step = int(np.searchsorted(-loss, -target))
    if step == 0 or step == len(size):  # within rounding of the last step
        return int(size[0]), int(size[min(step, len(size) - 1)])
    short = (loss[step] - target) / hull.slope[step - 1]
    return max(int(size[step] + short) - 1, int(size[step - 1])), int(size[step])

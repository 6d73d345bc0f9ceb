"""The textbook dynamic program over bytes, with Pareto states instead of a grid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..hull import Hull, lower_hull, undominated
from ..problem import Problem, Solution
from . import SOLVERS
from .certified import ROUNDING, pareto
from .greedy import upgrade

MAX_STATES = 4_000  # per unit


@SOLVERS.register("dp", exact=True, mixed_rows=True)
def dp(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Solve exactly by dynamic programming over Pareto states of (bytes, loss).

    Units are decided in order.  Of all partial plans only those are kept that no other matches in
    both bytes and loss, counted in integer bytes: nothing is rounded to a grid.  Where there are
    more than MAX_STATES, those whose LP bound on the whole plan is not below the best known loss
    are dropped as well, which is still exact; if there are too many even so, those of the least
    bound are kept and ``lower_bound`` is the least bound among the dropped ones.

    Meant for up to some thousand units; ``certified`` needs far fewer states.

    Args:
        problem: The table as arrays.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic.

    Raises:
        ValueError: If even the smallest plan does not fit, or there are further constraints.

    References:
        Nemhauser and Ullmann (1969), "Discrete dynamic programming and capital allocation",
        Management Science; Dudzinski and Walukiewicz (1987), "Exact methods for the knapsack
        problem and its generalizations", EJOR.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> plan = dp(toy_problem(), max_bytes=112)
        >>> plan.choice.tolist(), plan.bytes, plan.loss, plan.gap
        ([1, 0, 1, 1], 104, 0.17578125, 0.0)
    """
    problem.require_bytes_only("dp")
    problem.check_feasible(max_bytes)
    hull = lower_hull(problem)
    relaxed = hull.relax(problem, max_bytes)
    best = problem.evaluate(upgrade(problem, relaxed.choice, max_bytes), np.inf)
    target = best.loss - ROUNDING * abs(best.loss)
    keep = undominated(problem.bytes, problem.loss)
    later = np.append(problem.smallest_bytes()[::-1].cumsum()[::-1], 0)  # bytes units j... need

    size, loss, dropped = np.zeros(1, dtype=np.int64), np.zeros(1), np.inf
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    for unit, row in enumerate(keep):
        options = np.flatnonzero(row)
        size = (size[:, None] + problem.bytes[unit, options]).ravel()
        loss = (loss[:, None] + problem.loss[unit, options]).ravel()
        live = np.flatnonzero(size + later[unit + 1] <= max_bytes)
        live = live[pareto(size[live], loss[live])]
        if len(live) > MAX_STATES:
            bound = loss[live] + _rest(problem, hull, unit + 1, max_bytes - size[live])
            live, bound = live[bound < target], bound[bound < target]
            if len(live) > MAX_STATES:
                order = bound.argsort(kind="stable")
                dropped = min(dropped, float(bound[order[MAX_STATES]]))
                live = live[np.sort(order[:MAX_STATES])]
        if not len(live):  # the best known plan cannot be improved
            return problem.evaluate(best.choice, max(dropped, relaxed.bound))
        parent, option = np.divmod(live, len(options))
        history.append((parent.astype(np.int32), options[option].astype(np.int16)))
        size, loss = size[live], loss[live]
    found = problem.evaluate(trace(history, int(loss.argmin())), np.inf)
    best = found if found.loss < best.loss else best
    return problem.evaluate(best.choice, max(dropped, relaxed.bound))


def _rest(problem: Problem, hull: Hull, first: int, room: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [S], the LP optimum of units ``first``... within ``room`` [S] bytes."""
    units, start = np.arange(first, len(problem.units)), hull.start[first:]
    room = room - int(problem.bytes[units, start].sum())
    steps = hull.unit >= first
    size = np.append(0, hull.bytes[steps].cumsum())
    gain = np.append(0.0, hull.gain[steps].cumsum())
    gained: NDArray[np.float64] = np.interp(room, size, gain)
    return float(problem.loss[units, start].sum()) - gained


def trace(
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]], state: int
) -> NDArray[np.intp]:
    """intp [U], the formats on the way to a final state; history has (parent, format) per unit."""
    choice = np.empty(len(history), dtype=np.intp)
    for unit in reversed(range(len(history))):
        parents, formats = history[unit]
        choice[unit] = formats[state]
        state = int(parents[state])
    return choice

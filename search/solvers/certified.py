"""The default solver: LP bound, greedy plan, then an exact search of the few open units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..hull import Hull, Relaxation, lower_hull, undominated
from ..problem import Problem, Solution
from . import SOLVERS

MAX_STATES = 20_000  # states kept per unit of the core
MAX_WORK = 12_000_000  # states made in total, eight scanned hull steps counting as one
ROUNDING = 1e-13  # relative loss differences below this are noise of float64 sums


@SOLVERS.register("certified", exact=True, limits=True, mixed_rows=True)
def certified(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Solve the multiple-choice knapsack in integer bytes, with a proof.

    1. The convex hulls of all units and one sort give the LP optimum: a plan with at most one
       fractional unit, the multiplier of the byte constraint, and a lower bound.
    2. The greedy plan rounds the fractional unit down and spends the bytes left on further steps.
    3. An option's reduced cost is what it adds to the LP bound at the multiplier.  Options at or
       above (greedy loss - bound) cannot be part of a better plan; few units keep any other: the
       core.
    4. A dynamic program over the core, units with the cheapest deviation first, keeps the Pareto
       states of (bytes, loss) whose own bound is below the best plan so far.

    When the program runs dry the best plan is optimal and ``lower_bound`` equals its loss.  When
    it has to drop states to stay within MAX_STATES and MAX_WORK, ``lower_bound`` is the least
    bound among the dropped ones, which still holds for every plan.

    Limits besides the bytes are left to the ``highs`` solver.

    Args:
        problem: The table as arrays.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic.

    Raises:
        ValueError: If even the smallest plan does not fit.

    References:
        Pisinger (1995), "A minimal algorithm for the multiple-choice knapsack problem", EJOR;
        Dyer, Kayal and Walker (1984), "A branch and bound algorithm for solving the
        multiple-choice knapsack problem".

    Example:
        >>> from bitplan.testing import toy_problem
        >>> plan = certified(toy_problem(), max_bytes=112)
        >>> plan.choice.tolist(), plan.bytes, plan.loss, plan.gap
        ([1, 0, 1, 1], 104, 0.17578125, 0.0)
    """
    problem.check_feasible(max_bytes)
    if problem.constraints:
        return SOLVERS.get("highs")(problem, max_bytes, seed=seed)
    best = problem.evaluate(problem.best_choice(), np.inf)
    if best.bytes <= max_bytes:
        return best
    hull = lower_hull(problem)
    relaxed = hull.relax(problem, max_bytes)
    greedy = problem.evaluate(_spend_slack(hull, relaxed), np.inf)
    tolerance = ROUNDING * abs(greedy.loss)
    excess = greedy.loss - relaxed.bound
    if excess <= tolerance:
        return greedy
    core = _Core.build(problem, hull, relaxed, excess - tolerance)
    found = _search(core, excess, tolerance)
    choice = greedy.choice.copy()
    if found.deviations is not None:
        choice = relaxed.choice.copy()
        for unit, target in found.deviations:
            choice[unit] = target
    return problem.evaluate(choice, relaxed.bound + found.proven if found.open else np.inf)


def _spend_slack(hull: Hull, relaxed: Relaxation) -> NDArray[np.intp]:
    """intp [U], the rounded-down LP plan plus the further steps that fit, in order of slope.

    A step that does not fit stops its unit; the others go on.
    """
    choice, slack = relaxed.choice.copy(), relaxed.slack
    unit, target, size = (a[relaxed.steps :] for a in (hull.unit, hull.format, hull.bytes))
    while len(unit):
        position = np.arange(len(unit))
        stop = np.full(len(choice), len(unit))
        np.minimum.at(stop, unit[size > slack], position[size > slack])
        open_ = position < stop[unit]
        unit, target, size = unit[open_], target[open_], size[open_]
        taken = int(np.searchsorted(size.cumsum(), slack, side="right"))
        choice[unit[:taken]] = target[:taken]
        slack -= int(size[:taken].sum())
        unit, target, size = unit[taken:], target[taken:], size[taken:]
    return choice


class _Options(NamedTuple):
    """What one unit of the core may change to; the first entry is no change.

    Attributes:
        format: intp [M].
        bytes: int64 [M], bytes added (negative: freed) against the rounded-down LP plan.
        cost: float64 [M], reduced cost: loss added plus slope times bytes added, never negative.
    """

    format: NDArray[np.intp]
    bytes: NDArray[np.int64]
    cost: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Core:
    """The open units, cheapest deviation first, and an LP bound on those not yet decided.

    Attributes:
        units: intp [J], the open units.
        options: Their options.
        cheapest: float64 [J + 1], the least reduced cost of a deviation of unit j or any later
            one; inf at the end.
        slack: Bytes the rounded-down LP plan leaves unused.
        slope: The multiplier, nats per byte.
        rises: Hull steps of the open units above that plan: (position j, bytes, cost per byte).
        falls: The same below that plan, for freeing bytes.
    """

    units: NDArray[np.intp]
    options: list[_Options]
    cheapest: NDArray[np.float64]
    slack: int
    slope: float
    rises: tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.float64]]
    falls: tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.float64]]

    @classmethod
    def build(cls, problem: Problem, hull: Hull, relaxed: Relaxation, excess: float) -> _Core:
        """Keep the options whose reduced cost is below ``excess``."""
        rows = np.arange(len(problem.units))
        base = relaxed.choice
        extra = problem.bytes - problem.bytes[rows, base][:, None]
        cost = problem.loss - problem.loss[rows, base][:, None] + relaxed.slope * extra
        cost = np.maximum(cost, 0.0)  # negative only by rounding
        near = cost < excess
        near[rows, base] = False
        touched = near.any(axis=1)
        near[touched] &= undominated(problem.bytes[touched], problem.loss[touched])
        cheapest = np.where(near, cost, np.inf).min(axis=1)
        units = np.argsort(cheapest, kind="stable")[: int((cheapest < np.inf).sum())]
        options = []
        for unit in units:
            formats = np.concatenate(([base[unit]], np.flatnonzero(near[unit])))
            options.append(_Options(formats, extra[unit, formats], cost[unit, formats]))
        position = np.full(len(rows), -1)
        position[units] = np.arange(len(units))
        per_byte = np.abs(hull.slope - relaxed.slope)
        steps = [np.arange(relaxed.steps, len(hull.unit)), np.arange(relaxed.steps)[::-1]]
        steps = [s[position[hull.unit[s]] >= 0] for s in steps]
        rises, falls = ((position[hull.unit[s]], hull.bytes[s], per_byte[s]) for s in steps)
        ends = np.append(cheapest[units], np.inf)
        return cls(units, options, ends, relaxed.slack, relaxed.slope, rises, falls)

    def completion(self, stage: int, slack: NDArray[np.int64]) -> NDArray[np.float64]:
        """LP bound on what units ``stage``... must still add to states with ``slack`` bytes left.

        Bytes left are filled by the next hull steps or paid at the multiplier; missing bytes
        (negative slack) are freed by undoing steps.
        """
        fill_x, fill_y = _cumulative(self.rises, stage)
        free_x, free_y = _cumulative(self.falls, stage)
        unused = np.maximum(slack - fill_x[-1], 0) * self.slope
        fill = np.interp(slack, fill_x, fill_y) + unused
        free = np.interp(-slack, free_x, free_y, right=np.inf)
        return np.where(slack >= 0, fill, free)


def _cumulative(
    steps: tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.float64]], stage: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bytes and cost after each of the steps of units ``stage``..., from (0, 0)."""
    position, size, per_byte = steps
    left = position >= stage
    size, per_byte = size[left], per_byte[left]
    return np.append(0.0, size.cumsum()), np.append(0.0, (size * per_byte).cumsum())


class _Found(NamedTuple):
    """Outcome of the search, as losses above the LP bound.

    Attributes:
        deviations: (unit, format) changes to the rounded-down LP plan; None if the greedy plan
            stays the best.
        proven: No plan is closer to the LP bound than this.
        open: Whether a plan better than the best one found may exist.
    """

    deviations: list[tuple[int, int]] | None
    proven: float
    open: bool


def _search(core: _Core, excess: float, tolerance: float) -> _Found:
    """Decide the open units one by one, over Pareto states of (bytes, loss).

    Args:
        core: The open units.
        excess: Loss of the best known plan above the LP bound.
        tolerance: Only improvements larger than this are looked for.
    """
    best, best_at = excess, None
    dropped, work = np.inf, 0
    size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    for stage, options in enumerate(core.options):
        width = len(options.bytes)
        size = (size[:, None] + options.bytes).ravel()
        cost = (cost[:, None] + options.cost).ravel()
        slack = core.slack - size
        value = np.where(slack >= 0, cost + core.slope * slack, np.inf)  # as is, no more changes
        first = int(value.argmin())
        if value[first] < best - tolerance:
            best, best_at = float(value[first]), (stage, *divmod(first, width))

        rest = np.maximum(core.completion(stage + 1, slack), core.cheapest[stage + 1])
        bound = cost + rest  # of plans that change at least one more unit
        live = np.flatnonzero(bound < best - tolerance)
        live = live[pareto(size[live], cost[live] - core.slope * size[live])]
        work += len(size) + (len(core.rises[0]) + len(core.falls[0])) // 8
        room = MAX_STATES if work <= MAX_WORK else 0
        if len(live) > room:
            live = live[bound[live].argsort(kind="stable")]
            dropped = min(dropped, float(bound[live[room]]))
            live = live[:room]
        if not len(live):
            break
        size, cost = size[live], cost[live]
        parent, option = np.divmod(live, width)
        history.append((parent.astype(np.int32), option.astype(np.int16)))
    deviations = None if best_at is None else _trace(core, history, best_at)
    return _Found(deviations, min(best, dropped), dropped < best - tolerance)


def pareto(size: NDArray[np.int64], loss: NDArray[np.float64]) -> NDArray[np.intp]:
    """intp, the states no other matches in both bytes and loss, in order of bytes."""
    order = np.lexsort((loss, size))
    ahead = np.minimum.accumulate(np.append(np.inf, loss[order]))[:-1]
    result: NDArray[np.intp] = order[loss[order] < ahead]
    return result


def _trace(
    core: _Core,
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]],
    end: tuple[int, int, int],
) -> list[tuple[int, int]]:
    """Follow the parents of a state back to the start; ``end`` is (stage, parent, option)."""
    stage, parent, option = end
    deviations = []
    while True:
        deviations.append((int(core.units[stage]), int(core.options[stage].format[option])))
        if stage == 0:
            return deviations
        stage -= 1
        parents, options = history[stage]
        parent, option = int(parents[parent]), int(options[parent])

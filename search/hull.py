"""Lower convex hulls of all units at once, and the LP relaxation of the knapsack they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .problem import NO_BYTES, Problem


class Relaxation(NamedTuple):
    """The LP optimum at one budget.

    Attributes:
        steps: Number of hull steps taken in full.
        choice: intp [U], the integer plan after those steps.
        slack: Bytes that plan leaves unused.
        slope: The multiplier of the byte constraint, nats per byte: the slope of the first step
            that does not fit, or 0 if none is left.
        bound: Loss of the LP optimum, nats per token: a lower bound on every plan's loss.
    """

    steps: int
    choice: NDArray[np.intp]
    slack: int
    slope: float
    bound: float


@dataclass(frozen=True, slots=True)
class Hull:
    """All steps from the smallest plan to the best one, steepest first: the LP frontier.

    A step moves one unit to the next vertex of its lower convex hull of loss over bytes.  Within
    a unit slopes only fall, so every prefix of the sorted steps is a plan, it is an optimal one
    for its own bytes, and between prefixes the LP optimum is linear.

    Attributes:
        start: intp [U], format of every unit in the smallest plan (of equals, least loss).
        unit: intp [K], the unit of every step.
        format: intp [K], the format the step moves it to.
        bytes: int64 [K], the bytes the step adds, positive.
        gain: float64 [K], the loss it removes, nats per token, positive.
        slope: float64 [K], ``gain / bytes``, never increasing.
    """

    start: NDArray[np.intp]
    unit: NDArray[np.intp]
    format: NDArray[np.intp]
    bytes: NDArray[np.int64]
    gain: NDArray[np.float64]
    slope: NDArray[np.float64]

    def choice(self, steps: int) -> NDArray[np.intp]:
        """intp [U], the plan after the first ``steps`` steps."""
        choice = self.start.copy()
        choice[self.unit[:steps]] = self.format[:steps]  # numpy keeps the last write of a unit
        return choice

    def relax(self, problem: Problem, max_bytes: int) -> Relaxation:
        """Solve the LP relaxation at a feasible budget of ``max_bytes`` bytes."""
        start_bytes = problem.evaluate(self.start, np.inf).bytes
        steps = int(np.searchsorted(self.bytes.cumsum(), max_bytes - start_bytes, side="right"))
        plan = problem.evaluate(self.choice(steps), np.inf)
        slack = max_bytes - plan.bytes
        slope = float(self.slope[steps]) if steps < len(self.slope) else 0.0
        return Relaxation(steps, plan.choice, slack, slope, plan.loss - slope * slack)


def lower_hull(problem: Problem) -> Hull:
    """Walk every unit's lower convex hull, steepest slope first, all units in parallel.

    One pass per hull vertex (at most F - 1) over the units that still have one; a final sort by
    slope, ties by unit index.  O(U F^2 + K log K).  Formats that are dominated, lie above the
    hull or bring no gain never become a step.

    References:
        Sinha and Zoltners (1979), "The multiple-choice knapsack problem", Operations Research.
    """
    is_smallest = problem.bytes == problem.smallest_bytes()[:, None]
    start = np.where(is_smallest, problem.loss, np.inf).argmin(axis=1)

    active, current = np.arange(len(problem.units)), start
    limit = np.full(
        len(active), np.inf
    )  # slopes fall along a hull; keeps rounding from breaking it
    walked: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]] = []
    while len(active):
        rows = np.arange(len(active))
        size, loss = problem.bytes[active], problem.loss[active]
        extra = size - size[rows, current][:, None]
        gain = loss[rows, current][:, None] - loss
        slope = np.where((extra > 0) & (gain > 0), gain, 0.0) / np.maximum(extra, 1)
        steepest = slope.max(axis=1)
        nearest = np.where(slope == steepest[:, None], extra, NO_BYTES).argmin(axis=1)
        moved = steepest > 0
        active, current = active[moved], nearest[moved]
        limit = np.minimum(limit, steepest)[moved]
        walked.append((active, current, limit))
    return _sorted_steps(problem, start, walked)


def _sorted_steps(
    problem: Problem,
    start: NDArray[np.intp],
    walked: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]],
) -> Hull:
    """Join the passes of the walk into one list of steps in order of slope."""
    position = start.copy()
    before = []
    for units, formats, _ in walked:
        before.append(position[units])
        position[units] = formats
    unit, target, slope = (np.concatenate(column) for column in zip(*walked, strict=True))
    source = np.concatenate(before)
    order = np.lexsort((unit, -slope))  # stable: a unit's equal slopes stay in walking order
    unit, target, source, slope = unit[order], target[order], source[order], slope[order]
    return Hull(
        start=start,
        unit=unit,
        format=target,
        bytes=problem.bytes[unit, target] - problem.bytes[unit, source],
        gain=problem.loss[unit, source] - problem.loss[unit, target],
        slope=slope,
    )


def undominated(size: NDArray[np.int64], loss: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool [U, F], options that no other option of the unit matches in both bytes and loss.

    Of identical options the first counts.

    Args:
        size: int64 [U, F], bytes of every option.
        loss: float64 [U, F], loss of every option; options with ``inf`` are never kept.
    """
    keep = loss < np.inf
    for f in range(loss.shape[1]):
        no_worse = (size[:, f, None] <= size) & (loss[:, f, None] <= loss)
        better = (size[:, f, None] < size) | (loss[:, f, None] < loss)
        better[:, f + 1 :] = True
        keep &= ~(no_worse & better)
    return keep

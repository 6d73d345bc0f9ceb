"""The smallest plan of a measured quality: a target in nats or perplexity instead of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .hull import lower_hull
from .oracle import Choice
from .problem import Problem, Solution
from .solvers import SOLVERS

TOLERANCE = 0.003  # of the plan's bytes: the search stops when the answer is known this well
MOST_MEASURED = 8  # plans


@dataclass(frozen=True, slots=True)
class Tried:
    """One plan that was measured: its bytes, predicted KL and measured KL or increase of loss."""

    bytes: int
    predicted: float
    measured: float


def smallest_within(
    problem: Problem,
    target: float,
    measured: Callable[[Choice], float],
    *,
    what: str = "KL",
    solver: str = "certified",
    seed: int = 0,
    report: Callable[[Tried], None] = lambda _: None,
    amount: Callable[[int], str] = lambda size: f"{size:,} B",
) -> Solution:
    """Bracket the smallest plan whose measured loss is at most ``target``.

    Every budget's plan is the solver's.  The first budgets come from the predicted frontier: the
    ratio of measured to predicted loss changes slowly along it, so that of the nearest measured
    plan says where to look.

    Args:
        problem: The table as arrays.
        target: In nats per token.
        measured: Measures a choice [U], nats per token on held-out text.
        what: Name of the target in messages.
        solver: Name of the solver.
        seed: Its seed.
        report: Called with every measured plan.
        amount: A number of bytes in words, for a problem where something else stands for them.

    Returns:
        The smallest plan found to reach the target; ``lower_bound`` is on its predicted loss at
        its own bytes.

    Raises:
        ValueError: If the target is not positive, or not even the largest plan reaches it.
    """
    if not target > 0:
        raise ValueError(f"A target {what} of {target:g} nats must be positive.")
    solve = SOLVERS.get(solver)
    tried: list[Tried] = []

    def attempt(max_bytes: int) -> Solution:
        solution = solve(problem, max_bytes, seed=seed)
        tried.append(Tried(solution.bytes, solution.loss, measured(solution.choice)))
        report(tried[-1])
        return solution

    low = int(problem.smallest_bytes().sum()) - 1  # the most bytes known to be too few
    most = problem.evaluate(problem.best_choice(), math.inf)
    best: Solution | None = None
    while len(tried) < MOST_MEASURED:
        high = best.bytes - 1 if best else most.bytes
        if high <= low or (best and high - low <= TOLERANCE * high):
            break
        # Just inside the bracket where the guess is outside: there a miss closes it.
        step = int(TOLERANCE * high) if tried else 0
        inside = (low + 1 + step, max(high - step, low + 1 + step))
        wanted = min(max(_budget(problem, target, tried), inside[0]), inside[1], high)
        found = attempt(wanted)
        if tried[-1].measured <= target:
            best = found
        else:
            low = wanted
    if best is None:
        best = attempt(most.bytes)
        if tried[-1].measured > target:
            raise ValueError(
                f"No plan reaches a measured {what} of {target:g} nats: the best one, of "
                f"{amount(most.bytes)}, has {tried[-1].measured:.4g}. Raise the target, or add "
                "formats with more bits."
            )
    return replace(best, note=f"{len(tried)} plans measured to reach {what} {target:g}.")


def _budget(problem: Problem, target: float, tried: list[Tried]) -> int:
    """Bytes of the LP frontier where the predicted loss times the nearest ratio is the target."""
    ratio = 1.0
    usable = [t for t in tried if t.predicted > 0 and t.measured > 0]
    if usable:
        nearest = min(usable, key=lambda t: abs(math.log(t.measured / target)))
        ratio = nearest.measured / nearest.predicted
    hull = lower_hull(problem)
    start = problem.evaluate(hull.start, np.inf)
    size = start.bytes + np.append(0, hull.bytes.cumsum())
    loss = start.loss - np.append(0.0, hull.gain.cumsum())
    return math.ceil(float(np.interp(-target / ratio, -loss, size)))

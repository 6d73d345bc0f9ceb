"""The least time of a quality target: milliseconds take the place of bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .conflicts import explain_infeasible
from .problem import Constraint, Problem, Solution
from .program import Program, all_limits, excess
from .solvers import SOLVERS

MAX_GAP = 1e-6  # relative, of the time
NANOSECONDS = 10**6  # of a millisecond
NEEDS_OF_FASTEST = "--fastest needs {} and times: --latency-device such as h100, or --latency."


def fastest(
    problem: Problem,
    max_bytes: int,
    milliseconds: NDArray[np.float64],
    max_loss: float,
    *,
    seed: int = 0,
) -> Solution:
    """Find the fastest choice whose predicted loss is within a target, and of those the best.

    First without the limits: the exact search for the fewest bytes, with nanoseconds for bytes.
    Where its answer breaks a limit, two 0/1 programs: the least time with the loss as one more
    limit, then the least loss within that time.

    Args:
        problem: The table as arrays, with its constraints.
        max_bytes: The most bytes the plan may take.
        milliseconds: float64 [U, F], time of every option.
        max_loss: The most the predicted loss may be, nats per token.
        seed: For solvers that draw random numbers.

    Returns:
        The choice.  ``lower_bound`` is on the loss of all choices that are as fast; the note says
        below what time no choice reaches the target.

    Raises:
        ValueError: If no choice is within all limits; says which conflict and by how much.
    """
    least = problem.evaluate(problem.best_choice(), np.inf).loss
    if least > max_loss:
        raise ValueError(
            f"No plan has a predicted KL of {max_loss:g} nats or less: the best one has "
            f"{least:.6g}. Accept more loss (--max-kl), or add formats with more bits."
        )
    time = by_time(replace(problem, constraints=(), max_loss=max_loss), milliseconds)
    slowest = int(time.bytes.max(axis=1).sum())
    found = SOLVERS.get("bisection")(time, slowest, seed=seed)
    bound = _nanoseconds(time, found.choice)
    limits = all_limits(problem, max_bytes)
    if any(excess(limit, found.choice) for limit in limits):
        found, bound = _limited(problem, max_bytes, time, bound, seed)
    note = (
        f"No plan with a predicted KL of {max_loss:g} or less is predicted to take less than "
        f"{describe_time(bound)}."
    )
    return replace(problem.evaluate(found.choice, found.lower_bound), note=note)


def _limited(
    problem: Problem, max_bytes: int, time: Problem, bound: int, seed: int
) -> tuple[Solution, int]:
    """The same under all limits, and below how many nanoseconds there is no such plan.

    Args:
        problem: The problem.
        max_bytes: The most bytes.
        time: The problem by time, with the target as ``max_loss``.
        bound: Nanoseconds below which there is none even without the limits.
        seed: For solvers that draw random numbers.
    """
    problem.check_feasible(max_bytes)
    target = Constraint("predicted KL", problem.loss, time.max_loss, "nats", "--max-kl")
    asked = replace(problem, constraints=(*problem.constraints, target))
    cost = time.bytes.astype(np.float64)
    answer = Program.build(asked, max_bytes).minimize(cost, max_gap=MAX_GAP)
    if answer is None:
        raise ValueError(explain_infeasible(asked, max_bytes))
    least = _nanoseconds(time, answer.choice)
    deadline = Constraint("latency", cost, least, "ns")
    limited = replace(problem, constraints=(*problem.constraints, deadline))
    best = SOLVERS.get("highs")(limited, max_bytes, seed=seed)
    return best, max(bound, min(math.ceil(answer.bound), least))


def _nanoseconds(time: Problem, choice: NDArray[np.intp]) -> int:
    return int(time.bytes[np.arange(len(choice)), choice].sum())


def by_time(problem: Problem, milliseconds: NDArray[np.float64]) -> Problem:
    """The same problem with whole nanoseconds, rounded up, where the bytes were.

    Every solver for a number of bytes then solves for a time.
    """
    time = np.where(problem.allowed, milliseconds * NANOSECONDS, 0.0)
    return replace(problem, bytes=np.ceil(time - 1e-6).astype(np.int64), weights=0)


def describe_time(nanoseconds: int) -> str:
    """``0.841207 ms``."""
    return f"{nanoseconds / NANOSECONDS:.6g} ms"

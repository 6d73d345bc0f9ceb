"""Reverse water-filling: the closed-form optimum of an exponential rate-loss model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..hull import lower_hull
from ..problem import Problem, Solution
from . import SOLVERS
from .greedy import upgrade

MAX_HALVINGS = 100  # of the water level: the interval is then below float64's resolution


@SOLVERS.register("baq")
def baq(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Give every weight the same loss: closed-form bits per unit, then rounded to formats.

    With ``loss_u(b) = c_u 4^-b`` at b bits per weight, n_u weights and a total of bits, the
    optimum is ``b_u = log2(c_u / (n_u mu)) / 2``, clipped to the unit's formats: every unit that
    is not clipped ends at the same loss ``mu`` per weight.  c_u is fitted to the unit's losses,
    mu is found by bisection so that the bytes fit, bits are rounded down to formats, and the
    bytes left are spent by the upgrades with the most loss per byte.

    From the paper: the model, the optimum and its equal-loss structure.  There a unit is a column
    of a matrix, c_u comes from a Hessian proxy, and bits are rounded to integers.

    Args:
        problem: The table as arrays, with ``unit_weights``.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic.

    Raises:
        ValueError: If even the smallest plan does not fit, the numbers of weights are unknown, or
            there are further constraints.

    References:
        Zhang et al. (2025), "BAQ: efficient bit allocation quantization for large language
        models", arXiv 2506.05664; Cover and Thomas (2006), "Elements of information theory",
        chapter 10: reverse water-filling.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> problem = toy_problem()
        >>> water_fill(problem, problem.unit_weights, 112).round(1).tolist()  # bytes
        [19.4, 36.6, 13.4, 42.6]
        >>> baq(problem, max_bytes=112).choice.tolist()
        [1, 0, 1, 1]
    """
    problem.require_bytes_only("baq")
    problem.check_feasible(max_bytes)
    weights = known_weights(problem, "baq")
    target = water_fill(problem, weights, max_bytes)
    fits = problem.allowed & (problem.bytes <= target[:, None])
    largest = np.where(fits, problem.bytes, -1).max(axis=1, keepdims=True)
    rounded = np.where(problem.bytes == largest, problem.loss, np.inf).argmin(axis=1)
    choice = upgrade(problem, rounded, max_bytes)
    return problem.evaluate(choice, lower_hull(problem).relax(problem, max_bytes).bound)


def known_weights(problem: Problem, solver: str) -> NDArray[np.int64]:
    """int64 [U], the weights of every unit, positive.

    Raises:
        ValueError: If they are unknown.
    """
    weights = problem.unit_weights
    if weights is None or not (weights > 0).all():
        raise ValueError(
            f"The {solver!r} solver counts bits per weight and needs the number of weights of "
            "every unit: fill in Problem.unit_weights, or use the 'certified' solver."
        )
    return weights


def sensitivity(problem: Problem, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [U], ``log2(c_u / n_u)`` of the least-squares fit ``loss_u(b) = c_u 4^-b``.

    Least squares on the losses of allowed formats, not on their logarithms: the formats with few
    bits, where the loss is, decide, and losses of zero or below need no exception.  -inf for
    units whose fit has no positive loss.
    """
    bits = 8 * problem.bytes / weights[:, None]
    least = np.where(problem.allowed, bits, np.inf).min(axis=1)
    shape = np.where(problem.allowed, 4.0 ** np.minimum(least[:, None] - bits, 0.0), 0.0)
    loss = np.where(problem.allowed, problem.loss, 0.0)
    fitted = (shape * loss).sum(axis=1) / (shape**2).sum(axis=1)  # the loss at the least bits
    with np.errstate(divide="ignore"):
        level: NDArray[np.float64] = np.log2(np.maximum(fitted, 0.0) / weights) + 2 * least
    return level


def water_fill(problem: Problem, weights: NDArray[np.int64], max_bytes: int) -> NDArray[np.float64]:
    """float64 [U], the real-valued optimal bytes of every unit, within its formats' bytes."""
    level = sensitivity(problem, weights)
    smallest = problem.smallest_bytes().astype(np.float64)
    largest = np.where(problem.allowed, problem.bytes, 0).max(axis=1).astype(np.float64)

    def filled(log_mu: float) -> NDArray[np.float64]:
        return np.clip(weights * (level - log_mu) / 16, smallest, largest)

    finite = level[np.isfinite(level)]
    if not len(finite):
        return smallest
    low = float(finite.min() - 16 * (largest / weights).max())  # everything at its largest
    high = float(finite.max())  # everything at its smallest
    if filled(low).sum() <= max_bytes:
        return filled(low)
    for _ in range(MAX_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if filled(middle).sum() <= max_bytes else (middle, high)
    return filled(high)

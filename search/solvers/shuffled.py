"""The null control with prices of the right kind on the wrong units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..hull import lower_hull
from ..problem import Problem, Solution
from . import SOLVERS
from .certified import certified


@SOLVERS.register("shuffled")
def shuffled(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Null control: solve exactly with losses permuted among like units; true loss reported.

    Rows of losses change places among units of one kind (matrix type) with the same bytes and
    the same allowed formats.  What the plan loses against ``certified`` is what knowing *which*
    unit of a kind is sensitive is worth.

    Args:
        problem: The table as arrays.
        max_bytes: The most bytes the plan may take.
        seed: Decides the permutation.

    Returns:
        The plan with its true loss, the true lower bound, and a note on how many units had one
        of their like to change places with.

    Raises:
        ValueError: If even the smallest plan does not fit, or there are further constraints.

    References:
        Fisher (1935), "The design of experiments": the permutation test.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> plan = shuffled(toy_problem(), max_bytes=112)
        >>> plan.choice.tolist(), plan.loss
        ([1, 1, 1, 0], 0.29296875)
        >>> plan.note
        'Losses changed places among 4 of 4 units; the others are unique.'
    """
    problem.require_bytes_only("shuffled")
    problem.check_feasible(max_bytes)
    source, mixed = _permutation(problem, np.random.default_rng(seed))
    choice = certified(replace(problem, loss=problem.loss[source]), max_bytes).choice
    solution = problem.evaluate(choice, lower_hull(problem).relax(problem, max_bytes).bound)
    note = f"Losses changed places among {mixed:,} of {len(source):,} units; the others are unique."
    return replace(solution, note=note)


def _permutation(problem: Problem, generator: np.random.Generator) -> tuple[NDArray[np.intp], int]:
    """intp [U], the unit every unit takes its losses from, and how many have one of their like."""
    kinds = problem.kinds or ("",) * len(problem.units)
    _, kind = np.unique(kinds, return_inverse=True)
    rows = np.concatenate([kind[:, None], problem.allowed, problem.bytes], axis=1)
    _, group, count = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)  # numpy 2.0 gives it the shape of rows
    source = np.empty(len(rows), dtype=np.intp)
    source[np.argsort(group, kind="stable")] = np.lexsort((generator.random(len(rows)), group))
    return source, int((count[group] > 1).sum())

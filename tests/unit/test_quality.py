"""The smallest plan of a measured quality, against all plans of small problems."""

from __future__ import annotations

import numpy as np
import pytest

from bitplan.search.quality import MOST_MEASURED, TOLERANCE, Tried, smallest_within
from bitplan.search.solvers.certified import certified
from bitplan.testing.problems import synthetic_problem


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
def test_the_answer_reaches_the_target_and_hardly_less_would(factor: float, target: float) -> None:
    problem = synthetic_problem(60, 6, seed=3)
    scale = problem.evaluate(problem.best_choice(), np.inf).loss
    worst = certified(problem, int(problem.smallest_bytes().sum())).loss
    goal = scale + target * (worst - scale)
    seen: list[Tried] = []

    def measured(choice: np.ndarray) -> float:
        return factor * problem.evaluate(choice, np.inf).loss

    found = smallest_within(problem, factor * goal, measured, report=seen.append)
    assert measured(found.choice) <= factor * goal
    assert len(seen) <= MOST_MEASURED
    smaller = certified(problem, int(found.bytes * (1 - 2 * TOLERANCE)))
    assert measured(smaller.choice) > factor * goal


def test_a_target_no_plan_reaches_says_what_the_best_one_has() -> None:
    problem = synthetic_problem(10, 4, seed=0)
    with pytest.raises(ValueError, match=r"No plan reaches .* has 5\."):
        smallest_within(problem, 0.1, lambda _: 5.0)
    with pytest.raises(ValueError, match="must be positive"):
        smallest_within(problem, 0.0, lambda _: 5.0)


def test_the_smallest_plan_is_found_when_it_reaches_the_target() -> None:
    problem = synthetic_problem(10, 4, seed=0)
    found = smallest_within(problem, 9.0, lambda c: 1e-3 * problem.evaluate(c, np.inf).loss)
    assert found.bytes == problem.smallest_bytes().sum()

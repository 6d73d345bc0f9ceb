"""Our solvers against the contract, and what the built-in ones promise besides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitplan.search.hull import lower_hull
from bitplan.search.problem import Problem
from bitplan.search.solvers import SOLVERS
from bitplan.testing import SolverContract
from bitplan.testing.problems import budgets
from bitplan.testing.solver import ROUNDING

pytestmark = pytest.mark.filterwarnings("ignore:Cross-unit covariances do not help")


class TestSolvers(SolverContract):
    plugins = SOLVERS.names()

    def test_the_bound_is_never_below_the_linear_one(self, name: str, problem: Problem) -> None:
        for lower in (problem, replace(problem, loss=problem.loss - 1.0)):
            for max_bytes in budgets(problem, 6):
                solution = SOLVERS.get(name)(lower, max_bytes)
                bound = lower_hull(lower).relax(lower, max_bytes).bound
                assert bound - ROUNDING * abs(bound) <= solution.lower_bound


def test_the_built_in_solvers_are_found() -> None:
    assert {"certified", "ilp", "uniform"} <= set(SOLVERS.names())


def test_uniform_names_the_smallest_single_format() -> None:
    problem = Problem(
        ("a", "b"),
        ("f", "g", "h"),
        np.array([[1, 2, 4], [1, 2, 4]]),
        np.array([[np.inf, 1.0, 0.5], [2.0, 1.0, 0.5]]),
    )
    with pytest.raises(ValueError, match="the smallest uniform plan takes 4 B"):
        SOLVERS.get("uniform")(problem, 3)


def test_uniform_without_a_common_format_is_refused() -> None:
    problem = Problem(
        ("a", "b"),
        ("f", "g", "h"),
        np.array([[1, 2, 3], [1, 2, 3]]),
        np.array([[np.inf, 1.0, np.inf], [1.0, np.inf, 1.0]]),
    )
    closed = np.array([[np.inf, 1.0, 1.0], [1.0, 1.0, np.inf], [1.0, np.inf, 1.0]])
    none = Problem(("a", "b", "c"), problem.formats, np.ones((3, 3), dtype=np.int64), closed)
    with pytest.raises(ValueError, match="No single format is allowed for every unit"):
        SOLVERS.get("uniform")(none, 100)
    assert SOLVERS.get("uniform")(problem, 100).choice.tolist() == [1, 0]

"""What every solver must do; a new file in search/solvers/ is tested on arrival."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitplan.benchmarks.bench_solvers import synthetic_problem
from bitplan.search import solvers
from bitplan.search.hull import lower_hull
from bitplan.search.problem import Constraint, Problem
from bitplan.search.solvers import SOLVERS

NAMES = SOLVERS.names()
ROUNDING = 1e-9  # relative
pytestmark = pytest.mark.filterwarnings("ignore:Cross-unit covariances do not help")


def budgets(problem: Problem, count: int) -> list[int]:
    """From the smallest uniform plan (which every solver can reach) to above the largest."""
    uniform = [problem.uniform_choice(f) for f in range(len(problem.formats))]
    sizes = [problem.evaluate(c, np.inf).bytes for c in uniform if c is not None]
    most = int(problem.bytes.max(axis=1).sum())
    return [int(b) for b in np.linspace(min(sizes), most + 1, count)]


def brute_force(problem: Problem, max_bytes: int) -> float:
    choices = itertools.product(*(np.flatnonzero(row) for row in problem.allowed))
    plans = (problem.evaluate(np.array(choice), np.inf) for choice in choices)
    return min(plan.loss for plan in plans if plan.bytes <= max_bytes)


def equipped(problem: Problem) -> Problem:
    """With all that a solver may ask for: weights, kinds, layers, scores and a modest target.

    Every plan reaches the target: ``bisection`` then finds the smallest one.
    """
    count = len(problem.units)
    finite = np.where(problem.allowed, problem.loss, 0.0)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (8, count, 1))
    return replace(
        problem,
        unit_weights=np.maximum(problem.bytes.max(axis=1), 1),
        kinds=tuple("ab"[u % 2] for u in range(count)),
        layers=tuple(u // 2 for u in range(count)),
        scores=(signs * np.sqrt(np.maximum(finite, 0.0))).astype(np.float32),
        max_loss=float(finite.max(axis=1).sum()),
    )


@pytest.fixture(scope="module")
def problem() -> Problem:
    """30 units x 8 formats; one unit is pinned, one cannot take the smallest format."""
    problem = synthetic_problem(30, 8, seed=1)
    loss = problem.loss.copy()
    loss[3, :7] = np.inf
    loss[5, 0] = np.inf
    return equipped(replace(problem, loss=loss))


def test_the_built_in_solvers_are_found() -> None:
    assert {"certified", "ilp", "uniform"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestSolver:
    def test_respects_bytes_and_counts_exactly(self, name: str, problem: Problem) -> None:
        rows = np.arange(len(problem.units))
        for max_bytes in budgets(problem, 6):
            solution = SOLVERS.get(name)(problem, max_bytes)
            assert solution.choice.shape == (len(problem.units),)
            assert solution.bytes == problem.bytes[rows, solution.choice].sum() <= max_bytes
            assert solution.loss == pytest.approx(problem.loss[rows, solution.choice].sum())

    def test_never_takes_a_closed_format(self, name: str, problem: Problem) -> None:
        for max_bytes in budgets(problem, 3):
            choice = SOLVERS.get(name)(problem, max_bytes).choice
            assert problem.allowed[np.arange(len(choice)), choice].all()

    def test_is_deterministic(self, name: str, problem: Problem) -> None:
        max_bytes = budgets(problem, 3)[1]
        first, second = (SOLVERS.get(name)(problem, max_bytes, seed=5) for _ in range(2))
        assert (first.choice == second.choice).all()
        assert (first.loss, first.lower_bound) == (second.loss, second.lower_bound)

    def test_is_never_below_the_linear_bound(self, name: str, problem: Problem) -> None:
        for max_bytes in budgets(problem, 6):
            solution = SOLVERS.get(name)(problem, max_bytes)
            bound = lower_hull(problem).relax(problem, max_bytes).bound
            assert solution.lower_bound <= solution.loss
            assert bound <= solution.lower_bound * (1 + ROUNDING)

    @pytest.mark.parametrize("seed", range(4))
    def test_a_claimed_optimum_is_one(self, name: str, seed: int) -> None:
        small = equipped(synthetic_problem(5, 4, seed))
        for max_bytes in budgets(small, 4):
            solution = SOLVERS.get(name)(small, max_bytes)
            # A solver for a quality target claims the least loss of plans of its own bytes.
            best = brute_force(small, solution.bytes if name == "bisection" else max_bytes)
            assert solution.lower_bound <= best * (1 + ROUNDING)
            if solution.lower_bound == solution.loss:
                assert solution.loss == pytest.approx(best, rel=ROUNDING)

    def test_single_unit_and_single_format(self, name: str) -> None:
        one = equipped(Problem(("u",), ("f",), np.array([[10]]), np.array([[0.5]]), weights=8))
        solution = SOLVERS.get(name)(one, 10)
        assert (solution.choice.tolist(), solution.loss, solution.gap) == ([0], 0.5, 0.0)

    def test_a_budget_below_the_smallest_plan_is_refused(self, name: str, problem: Problem) -> None:
        least = int(problem.smallest_bytes().sum())
        with pytest.raises(ValueError, match=r"1 B below the smallest possible plan"):
            SOLVERS.get(name)(problem, least - 1)

    def test_copes_with_losses_below_zero(self, name: str, problem: Problem) -> None:
        lower = replace(problem, loss=problem.loss - 1.0)
        max_bytes = budgets(problem, 4)[1]
        solution = SOLVERS.get(name)(lower, max_bytes)
        bound = lower_hull(lower).relax(lower, max_bytes).bound
        assert solution.bytes <= max_bytes
        assert bound - ROUNDING * abs(bound) <= solution.lower_bound <= solution.loss

    def test_obeys_further_constraints_or_refuses_them(self, name: str, problem: Problem) -> None:
        cost = np.random.default_rng(1).random(problem.bytes.shape)
        limit = 0.8 * cost.min(axis=1).sum() + 0.2 * cost.max(axis=1).sum()
        limited = replace(problem, constraints=(Constraint("latency", cost, float(limit), "ms"),))
        max_bytes = budgets(problem, 4)[2]
        try:
            choice = SOLVERS.get(name)(limited, max_bytes).choice
        except ValueError as error:
            assert "latency" in str(error)
            return
        assert cost[np.arange(len(choice)), choice].sum() <= limit
        assert problem.bytes[np.arange(len(choice)), choice].sum() <= max_bytes

    def test_says_in_one_line_what_it_does(self, name: str) -> None:
        first, blank, *_ = (SOLVERS.get(name).__doc__ or "").splitlines()
        assert first.endswith(".")
        assert not blank.strip()


def test_uniform_names_the_smallest_single_format(problem: Problem) -> None:
    least = int(problem.smallest_bytes().sum())
    with pytest.raises(ValueError, match="the smallest uniform plan takes"):
        SOLVERS.get("uniform")(problem, least)


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


NEW_SOLVER = '''
"""A solver in a file of its own."""

from bitplan.search.problem import Problem, Solution
from bitplan.search.solvers import SOLVERS


@SOLVERS.register("cheapest")
def cheapest(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Give every unit its smallest format.

    Nothing else.
    """
    problem.check_feasible(max_bytes)
    smallest = problem.smallest_bytes()
    choice = (problem.allowed & (problem.bytes == smallest[:, None])).argmax(axis=1)
    return problem.evaluate(choice, float("-inf"))
'''


@pytest.fixture
def new_solver(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "cheapest.py").write_text(NEW_SOLVER)
    solvers.__path__.append(str(tmp_path))
    importlib.invalidate_caches()
    yield "cheapest"
    solvers.__path__.remove(str(tmp_path))
    SOLVERS._found.pop("cheapest", None)
    sys.modules.pop(f"{solvers.__name__}.cheapest", None)
    vars(solvers).pop("cheapest", None)


def test_a_new_solver_is_one_file_and_one_decorator(new_solver: str, problem: Problem) -> None:
    assert SOLVERS.names() == sorted([*NAMES, new_solver])
    least = int(problem.smallest_bytes().sum())
    solution = SOLVERS.get(new_solver)(problem, least)
    assert solution.bytes == least
    assert problem.allowed[np.arange(len(problem.units)), solution.choice].all()
    with pytest.raises(ValueError, match="below the smallest possible plan"):
        SOLVERS.get(new_solver)(problem, least - 1)


def test_a_solver_leaves_with_its_file() -> None:
    assert "cheapest" not in SOLVERS.names()
    with pytest.raises(ValueError, match="Unknown solver 'cheapest'"):
        SOLVERS.get("cheapest")

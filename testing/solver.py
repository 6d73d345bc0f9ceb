"""What every solver promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ..search.problem import Constraint, Problem, Solution
from ..search.solvers import SOLVERS, Solver
from .contract import Contract
from .problems import brute_force, budgets, equipped, synthetic_problem, toy_oracle, toy_problem

ROUNDING = 1e-9  # relative
ORACLE_PLANS = 64  # an oracle's tokens pay for so many plans


class SolverContract(Contract):
    """A plan within the budget, counted exactly, with a bound that holds for every plan."""

    @pytest.fixture(scope="class")
    def problem(self) -> Problem:
        """30 units x 8 formats; one unit is pinned, one cannot take the smallest format."""
        problem = synthetic_problem(30, 8, seed=1)
        loss = problem.loss.copy()
        loss[3, :7] = np.inf
        loss[5, 0] = np.inf
        return equipped(replace(problem, loss=loss))

    def plugin(self, name: str) -> Solver:
        """The solver."""
        return SOLVERS.get(name)

    def bound_reaches(self, name: str, solution: Solution, max_bytes: int) -> int:
        """Bytes up to which no plan may have a loss below ``solution.lower_bound``."""
        return max_bytes

    def test_respects_bytes_and_counts_exactly(self, name: str, problem: Problem) -> None:
        """``bytes`` and ``loss`` are the sums of the table's."""
        rows = np.arange(len(problem.units))
        for max_bytes in budgets(problem, 6):
            solution = self.plugin(name)(problem, max_bytes)
            assert solution.choice.shape == (len(problem.units),)
            assert solution.bytes == problem.bytes[rows, solution.choice].sum() <= max_bytes
            assert solution.loss == pytest.approx(problem.loss[rows, solution.choice].sum())
            assert solution.lower_bound <= solution.loss

    def test_never_takes_a_closed_format(self, name: str, problem: Problem) -> None:
        """Formats with a loss of ``inf`` are not allowed."""
        for max_bytes in budgets(problem, 3):
            choice = self.plugin(name)(problem, max_bytes).choice
            assert problem.allowed[np.arange(len(choice)), choice].all()

    def test_is_deterministic(self, name: str, problem: Problem) -> None:
        """The same problem, budget and seed give the same plan."""
        max_bytes = budgets(problem, 3)[1]
        first, second = (self.plugin(name)(problem, max_bytes, seed=5) for _ in range(2))
        assert (first.choice == second.choice).all()
        assert (first.loss, first.lower_bound) == (second.loss, second.lower_bound)

    @pytest.mark.parametrize("seed", range(4))
    def test_a_bound_holds_and_a_claimed_optimum_is_one(self, name: str, seed: int) -> None:
        """Against all 1,024 plans of a small problem."""
        small = equipped(synthetic_problem(5, 4, seed))
        for max_bytes in budgets(small, 4):
            solution = self.plugin(name)(small, max_bytes)
            best = brute_force(small, self.bound_reaches(name, solution, max_bytes))
            assert solution.lower_bound <= best * (1 + ROUNDING)
            if solution.lower_bound == solution.loss:
                assert solution.loss == pytest.approx(best, rel=ROUNDING)

    def test_single_unit_and_single_format(self, name: str) -> None:
        """There is one plan."""
        one = equipped(Problem(("u",), ("f",), np.array([[10]]), np.array([[0.5]]), weights=8))
        solution = self.plugin(name)(one, 10)
        assert (solution.choice.tolist(), solution.loss, solution.bytes) == ([0], 0.5, 10)

    def test_a_budget_below_the_smallest_plan_is_refused(self, name: str, problem: Problem) -> None:
        """As ``Problem.check_feasible`` does."""
        least = int(problem.smallest_bytes().sum())
        with pytest.raises(ValueError, match=r"1 B below the smallest possible plan"):
            self.plugin(name)(problem, least - 1)

    def test_copes_with_losses_below_zero(self, name: str, problem: Problem) -> None:
        """Prices at a plan are changes from it, and some of them gains."""
        lower = replace(problem, loss=problem.loss - 1.0)
        max_bytes = budgets(problem, 4)[1]
        solution = self.plugin(name)(lower, max_bytes)
        assert solution.bytes <= max_bytes
        assert solution.loss == pytest.approx(
            lower.loss[np.arange(len(lower.units)), solution.choice].sum()
        )
        assert solution.lower_bound <= solution.loss < 0

    def test_obeys_further_constraints_or_refuses_them(self, name: str, problem: Problem) -> None:
        """As ``Problem.require_bytes_only`` does."""
        cost = np.random.default_rng(1).random(problem.bytes.shape)
        limit = 0.8 * cost.min(axis=1).sum() + 0.2 * cost.max(axis=1).sum()
        limited = replace(problem, constraints=(Constraint("latency", cost, float(limit), "ms"),))
        max_bytes = budgets(problem, 4)[2]
        try:
            choice = self.plugin(name)(limited, max_bytes).choice
        except ValueError as error:
            assert "latency" in str(error)
            return
        assert cost[np.arange(len(choice)), choice].sum() <= limit
        assert problem.bytes[np.arange(len(choice)), choice].sum() <= max_bytes

    def test_measures_if_it_says_so_within_its_tokens(self, name: str) -> None:
        """A solver marked as measuring asks the oracle, and a run gives no other solver one."""
        problem = toy_problem()
        measures = getattr(self.plugin(name), "measures", False)
        known = toy_oracle(problem, ORACLE_PLANS)
        first = self.plugin(name)(replace(problem, oracle=known), 128)
        assert (known.tokens > 0) == measures
        assert known.tokens <= known.max_tokens
        again = self.plugin(name)(replace(problem, oracle=toy_oracle(problem, ORACLE_PLANS)), 128)
        assert first.choice.tolist() == again.choice.tolist()
        assert first.bytes <= 128

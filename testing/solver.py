"""What every solver promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ..search.problem import Constraint, Problem
from ..search.solvers import SOLVERS, Solver, abilities
from .contract import Contract
from .problems import brute_force, budgets, equipped, synthetic_problem, toy_problem

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
        """Against all 1,024 plans of a small problem, which an exact solver finds the best of."""
        small = equipped(synthetic_problem(5, 4, seed))
        for max_bytes in budgets(small, 4):
            solution = self.plugin(name)(small, max_bytes)
            # Whoever looks for the fewest bytes has a bound on plans of no more than those.
            reach = solution.bytes if abilities(name).seeks_target else max_bytes
            best = brute_force(small, reach)
            assert solution.lower_bound <= best * (1 + ROUNDING)
            if solution.lower_bound == solution.loss or abilities(name).exact:
                assert solution.loss == pytest.approx(best, rel=ROUNDING)

    @pytest.mark.parametrize("seed", range(4))
    def test_looks_for_the_fewest_bytes_if_it_says_so(self, name: str, seed: int) -> None:
        """Within the target; any other solver spends the budget on quality, whatever the target."""
        small = synthetic_problem(5, 4, seed)
        losses = np.geomspace(brute_force(small, small.bytes.max() * 5), small.loss[:, 0].sum(), 5)
        most = int(small.bytes.max(axis=1).sum())
        for target in map(float, losses[1:-1]):
            problem = replace(equipped(small), max_loss=target)
            solution = self.plugin(name)(problem, most)
            if not abilities(name).seeks_target:
                free = self.plugin(name)(equipped(small), most)
                assert solution.choice.tolist() == free.choice.tolist()
                continue
            assert solution.loss <= target
            assert brute_force(small, solution.bytes - 1) > target

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

    def test_obeys_further_limits_or_refuses_them(self, name: str, problem: Problem) -> None:
        """As it says; a refusal (``Problem.require_bytes_only``) names the limit."""
        cost = np.random.default_rng(1).random(problem.bytes.shape)
        limit = 0.8 * cost.min(axis=1).sum() + 0.2 * cost.max(axis=1).sum()
        limited = replace(problem, constraints=(Constraint("latency", cost, float(limit), "ms"),))
        max_bytes = budgets(problem, 4)[2]
        if not abilities(name).limits:
            with pytest.raises(ValueError, match="latency"):
                self.plugin(name)(limited, max_bytes)
            return
        choice = self.plugin(name)(limited, max_bytes).choice
        assert cost[np.arange(len(choice)), choice].sum() <= limit
        assert problem.bytes[np.arange(len(choice)), choice].sum() <= max_bytes

    def test_needs_no_weights_per_unit_if_it_says_so(self, name: str, problem: Problem) -> None:
        """Rows may be KV caches; other solvers may refuse, but not with another plan."""
        max_bytes = budgets(problem, 3)[1]
        unknown = replace(problem, unit_weights=None)
        try:
            solution = self.plugin(name)(unknown, max_bytes)
        except ValueError as error:
            assert not abilities(name).mixed_rows
            assert "weights" in str(error)
            return
        assert solution.choice.tolist() == self.plugin(name)(problem, max_bytes).choice.tolist()

    def test_asks_the_oracle_if_it_says_so(self, name: str) -> None:
        """Within its tokens, for a better plan by its figures; a run gives no other solver one."""
        problem, max_bytes = toy_problem(ORACLE_PLANS), 112
        oracle = problem.oracle
        assert oracle is not None
        solution = self.plugin(name)(problem, max_bytes)
        assert (oracle.tokens > 0) == abilities(name).needs_oracle
        assert oracle.tokens <= oracle.max_tokens
        assert solution.bytes <= max_bytes
        again = self.plugin(name)(toy_problem(ORACLE_PLANS), max_bytes)
        assert solution.choice.tolist() == again.choice.tolist()
        if abilities(name).needs_oracle:
            table = self.plugin("certified")(replace(problem, oracle=None), max_bytes)
            assert oracle.mean_kl(solution.choice) < oracle.mean_kl(table.choice)

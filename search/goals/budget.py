"""The least KL within a number of bytes of the weights."""

from __future__ import annotations

from ...sensitivity.table import SensitivityTable
from ..budget import Budget
from ..conflicts import explain_infeasible, feasible
from ..coverage import check_coverage, outside_bytes
from ..plan import BudgetRef
from ..problem import Problem
from . import GOALS, Asked, Goal


@GOALS.register("budget")
class OfBudget(Goal):
    """The best plan within bytes, bits per weight, a ratio or a file's size."""

    name = "budget"
    takes_oracle = True

    @classmethod
    def matches(cls, asked: Asked) -> bool:
        """Whether a budget of the weights was given."""
        return asked.budget is not None

    def resolve(self, problem: Problem, table: SensitivityTable) -> BudgetRef:
        """The budget in bytes.

        Raises:
            ValueError: If not even the smallest plan fits, the limits conflict, or the budget is
                per weight and the units hold too few of them.
        """
        budget = Budget.parse(self.asked.budget or "")
        check_coverage(table, budget)
        size = budget.resolve(table.weights, outside_bytes(table, budget))
        problem.check_feasible(size)
        if problem.constraints and not feasible(problem, size):
            raise ValueError(explain_infeasible(problem, size))
        return BudgetRef(text=budget.text, bytes=size)

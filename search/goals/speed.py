"""The fastest plan of a measured quality."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...sensitivity.table import SensitivityTable
from ..coverage import check_coverage
from ..fastest import by_time, describe_time
from ..plan import BudgetRef, Latency, Plan
from ..problem import Problem
from . import GOALS, Asked
from .quality import OfQuality


@GOALS.register("speed")
class OfSpeed(OfQuality):
    """The least time within a measured KL or perplexity, of any number of bytes."""

    name = "speed"
    resampled = False

    @classmethod
    def matches(cls, asked: Asked) -> bool:
        """Whether the fastest plan was asked for."""
        return asked.fastest

    @property
    def text(self) -> str:
        """The target in words."""
        return f"{super().text}, fastest"

    def resolve(self, problem: Problem, table: SensitivityTable) -> BudgetRef:
        """The target, and the bytes of the largest plan: any number will do."""
        check_coverage(table, None)
        most = int(np.where(problem.allowed, problem.bytes, 0).max(axis=1).sum())
        return BudgetRef(text=self.text, bytes=most, kind="target")

    def settled(self, budget: BudgetRef, size: int) -> BudgetRef:
        """The budget as it was: the fastest plan may take any number of bytes."""
        return budget

    def size_of(self, plan: Plan) -> float:
        """Milliseconds."""
        assert plan.latency is not None
        return plan.latency.ms

    def most(self, first: Plan) -> float:
        """The time of the solver's plan."""
        return self.size_of(first)

    def sized(
        self, problem: Problem, table: SensitivityTable
    ) -> tuple[Problem, Callable[[int], str]]:
        """The problem with nanoseconds for bytes."""
        return by_time(problem, self.limits.milliseconds(table, problem.allowed)), describe_time

    def latency_of(self, table: SensitivityTable, choice: NDArray[np.intp]) -> Latency | None:
        """Time of a plan, which rivals must keep."""
        latency = super().latency_of(table, choice)
        return latency and latency.model_copy(update={"max_ms": latency.ms})

"""Solvers of the multiple-choice knapsack, one file each; the file name is the solver's name."""

from __future__ import annotations

from typing import Protocol, TypeVar

from ..._base.registry import Registry
from ..problem import Problem, Solution


class Solver(Protocol):
    """Picks one format per unit within ``max_bytes``, for the least loss it can find.

    A solver raises ValueError when nothing fits (``Problem.check_feasible``), gives the same
    answer for the same arguments, and reports a lower bound that holds for every choice.
    """

    def __call__(self, problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
        """Solve ``problem``; ``seed`` is for solvers that draw random numbers."""
        ...


S = TypeVar("S", bound=Solver)


def measuring(solver: S) -> S:
    """Mark a solver that asks ``problem.oracle``: a run then gives it one."""
    solver.measures = True  # type: ignore[attr-defined]
    return solver


SOLVERS: Registry[Solver] = Registry("solver", __name__)

"""Solvers of the multiple-choice knapsack, one file each; the file name is the solver's name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from ..._base.hints import did_you_mean
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


SOLVERS: Registry[Solver] = Registry("solver", __name__)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a solver can do, as it was registered: ``@SOLVERS.register("dp", exact=True)``.

    Whoever runs solvers goes by these and never by a name.

    Attributes:
        exact: It finds the optimum of the prices, or proves how far from it it is: prices alone
            decide its plans. They are refined by default and resampled for their confidence.
        limits: It obeys ``Problem.constraints``, not only the number of bytes.
        mixed_rows: It needs no number of weights per unit, so that KV caches may be rows beside
            the weights.
        needs_oracle: It asks ``Problem.oracle``, which measures on the model: a run gives it one.
        objectives: What the trials of its Optuna study minimize, for one that keeps a study that
            several workers may share.
        seeks_target: It looks for the fewest bytes within ``Problem.max_loss``, instead of for
            the least loss within the bytes.
    """

    exact: bool = False
    limits: bool = False
    mixed_rows: bool = False
    needs_oracle: bool = False
    objectives: tuple[str, ...] = ()
    seeks_target: bool = False


def abilities(solver: str) -> Abilities:
    """What a solver can do.

    Raises:
        ValueError: If there is no such solver, or it was registered with an ability that there
            is not.
    """
    traits, known = SOLVERS.traits(solver), [field.name for field in fields(Abilities)]
    for trait in traits:
        if trait not in known:
            raise ValueError(
                f"The solver {solver!r} is registered with {trait!r}, which is no ability of a "
                f"solver.{did_you_mean(trait, known)} There are: {', '.join(known)}."
            )
    return Abilities(**traits)


def solvers_that(ability: str) -> list[str]:
    """Names of the solvers with an ability, such as ``limits``."""
    return [name for name in SOLVERS.names() if getattr(abilities(name), ability)]


def is_exact(solver: str) -> bool:
    """Whether a plan's ``solver`` is one whose plans prices alone decide; unknown ones are not."""
    return solver in SOLVERS.names() and abilities(solver).exact

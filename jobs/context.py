"""What the stages of a search share: what is asked, what is loaded, and what was found so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .._base.progress import Reporter
from ..models.samples import Samples
from ..models.wording import Words
from ..search.goals import Goal
from ..search.plan import BudgetRef, Plan
from ..search.problem import Problem, Solution
from ..search.refine import Refined
from ..search.solvers import Abilities, abilities
from ..sensitivity.table import SensitivityTable
from .folder import RunFolder
from .held_out import HeldOut
from .job import Job
from .prepare import Work
from .settings import ProfileSettings, SearchSettings
from .truth import Truth, guarded


@dataclass
class Context:
    """A search at work.

    The fields without a default are filled in by the stages, in the order they stand here; a stage
    may use what stages before it have found.

    Attributes:
        settings: What determines the profile.
        search: What is asked for.
        goal: The same, as a problem and what answers it.
        work: The model, its units and its calibration sequences.
        samples: Held-out sequences.
        also: Those of a second text, of another kind; None without one.
        folder: The run folder.
        job: Its state and log.
        reporter: Where progress is shown.
        table: What every unit costs, as the plan's runtime has it.
        problem: The problem to solve.
        budget: What was asked for, in bytes.
        solution: The solver's answer.
        plans: The plans that were made so far, by name; the solver's is the first.
        uniform: Names of those with one format -> that format.
        refined: How refinement went; None without any.
        plan: The plan that ships.
    """

    settings: ProfileSettings
    search: SearchSettings
    goal: Goal
    work: Work
    samples: Samples
    folder: RunFolder
    job: Job
    reporter: Reporter
    also: Samples | None = None
    table: SensitivityTable = field(init=False)
    problem: Problem = field(init=False)
    budget: BudgetRef = field(init=False)
    solution: Solution = field(init=False)
    plans: dict[str, Plan] = field(default_factory=dict)
    uniform: dict[str, str] = field(default_factory=dict)
    refined: Refined | None = None
    plan: Plan = field(init=False)

    @property
    def solver(self) -> Abilities:
        """What the solver can do."""
        return abilities(self.search.solver)

    @property
    def words(self) -> Words:
        """How the model's samples are called."""
        return self.work.provenance.words

    @property
    def first(self) -> Plan:
        """The solver's plan."""
        return next(iter(self.plans.values()))

    @cached_property
    def held_out(self) -> HeldOut:
        """The model on held-out data."""
        return HeldOut(
            self.work.model,
            self.work.renderer,
            self.samples,
            self.folder,
            self.reporter,
        )

    @property
    def held_out_also(self) -> HeldOut | None:
        """The model on the second held-out text, if there is one."""
        if self.also is None:
            return None
        return HeldOut(
            self.work.model,
            self.work.renderer,
            self.also,
            self.folder,
            self.reporter,
            self.folder.measurements_also,
        )

    @cached_property
    def inside_and_apart(self) -> tuple[Samples, Samples]:
        """Sequences that changes of a plan are made from, and others to measure them on.

        Raises:
            ValueError: If too few are left to measure on.
        """
        work = self.work
        return guarded(work.model, self.settings, work.samples, self.search.guard)

    @cached_property
    def truth(self) -> Truth:
        """The model as solvers may ask it, on sequences kept apart.

        Raises:
            ValueError: If too few are left to measure on.
        """
        work, (inside, outside) = self.work, self.inside_and_apart
        return Truth(
            work.model,
            work.renderer,
            self.table,
            inside,
            outside,
            self.folder,
            self.settings.seed,
            self.reporter,
        )

    def written(self, problem: Problem, solution: Solution, solver: str | None = None) -> Plan:
        """A solution as a plan; by default the solver that was asked for has made it."""
        return self.goal.plan(
            self.table, problem, solution, self.budget, solver, self.search.command
        )


class Stage(NamedTuple):
    """One stage of a search: it takes what it needs from the context and leaves what it found.

    Attributes:
        name: As job.json calls it.
        run: Does it; finds what an earlier run left in the folder.
        applies: Whether this search has it.
    """

    name: str
    run: Callable[[Context], None]
    applies: Callable[[Context], bool] = lambda _: True

"""What a search can be asked for, one file each; the file name is the goal's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..._base.registry import Registry
from ...sensitivity.table import SensitivityTable
from ..kv import KVTable
from ..limits import Limits, build_problem
from ..plan import BudgetRef, KVCache, Latency, Plan
from ..problem import Problem, Solution
from ..solvers import abilities
from ..written import plan_from_choice


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, in the words of the options, and under which limits.

    Attributes:
        budget: Bytes of the weights, such as ``4.3bpw``.
        vram: Bytes of weights and KV cache together, with ``context`` tokens x ``batch``.
        max_kl: The most measured KL, nats per token.
        max_ppl: The most measured perplexity.
        fastest: The fastest instead of the smallest plan of that quality.
        context: Tokens per sequence that the KV cache must hold.
        batch: Sequences it must hold.
        solver: Name of the solver.
        limits: What a plan may not do besides.
    """

    budget: str | None = None
    vram: str | None = None
    max_kl: float | None = None
    max_ppl: float | None = None
    fastest: bool = False
    context: int = 4096
    batch: int = 1
    solver: str = "certified"
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What goals need to know of the model.

    Attributes:
        id: Its name.
        reads_text: Whether it has a perplexity and a KV cache.
        cache: The KV cache of every layer, without prices; None where no goal plans it.
    """

    id: str
    reads_text: bool
    cache: KVTable | None = None


class Goal(ABC):
    """What a plan is to be good at: which problem that is, and what answers it.

    Args:
        asked: What was asked for.
        model: What there is to know of the model.

    Attributes:
        cache: What the KV cache costs, where it shares the bytes; without prices until they were
            measured.
        is_target: Whether a quality is asked for, whose bytes are a result: plans are measured
            until one is found (:func:`..quality.smallest_within`).
        takes_oracle: Whether solvers may search, and refinement may go on, by measured KL: the
            rows are weights alone, and their bytes are given.
        resampled: Whether its plans depend on prices and a number of bytes only, so that a
            bootstrap of the prices says how sure they are.

    Raises:
        ValueError: If the model or the solver cannot do that.
    """

    name: ClassVar[str]
    is_target: ClassVar[bool] = False
    takes_oracle: ClassVar[bool] = False
    resampled: ClassVar[bool] = True

    def __init__(self, asked: Asked, model: ModelFacts) -> None:
        if abilities(asked.solver).seeks_target:
            raise ValueError(
                f"The {asked.solver!r} solver looks for a predicted KL: use it with `bitplan solve "
                "--max-kl`. `bitplan search --max-kl` finds the smallest plan of a measured KL."
            )
        self.asked, self.limits, self.model = asked, asked.limits, model
        self.cache = model.cache

    @classmethod
    @abstractmethod
    def matches(cls, asked: Asked) -> bool:
        """Whether this is the goal that was asked for."""

    @abstractmethod
    def resolve(self, problem: Problem, table: SensitivityTable) -> BudgetRef:
        """What was asked for in words, and the most bytes a plan may take.

        Raises:
            ValueError: If not even the smallest plan fits.
        """

    def problem(self, table: SensitivityTable) -> Problem:
        """The problem to solve: the table's units, and whatever else shares the bytes.

        Raises:
            ValueError: If the limits leave nothing, or the solver cannot do that.
        """
        problem = build_problem(self.limits.for_runtime(table), self.limits)
        able = abilities(self.asked.solver)
        if not able.limits:
            problem.require_bytes_only(self.asked.solver)
        if able.needs_oracle and not self.takes_oracle:
            raise ValueError(
                f"The solver {self.asked.solver!r} needs a --budget. Use 'certified' for "
                "--vram and quality targets."
            )
        return problem

    def settled(self, budget: BudgetRef, size: int) -> BudgetRef:
        """The budget after a plan of ``size`` bytes was found: the same where it was given."""
        return budget

    def accepts(self, plan: Plan, kl: float) -> bool:
        """Whether a plan of this measured KL, nats per token, is an answer."""
        return plan.total_bytes <= plan.budget.bytes

    def size_of(self, plan: Plan) -> float:
        """What plans are compared by besides their KL: bytes, or milliseconds."""
        return plan.total_bytes

    def sized(
        self, problem: Problem, table: SensitivityTable
    ) -> tuple[Problem, Callable[[int], str]]:
        """The problem whose "bytes" are what to have little of, and how to say an amount of it."""
        return problem, lambda size: f"{size:,} B"

    def rivals(self, uniform: Mapping[str, Plan], first: Plan) -> dict[str, Plan]:
        """The uniform plans to measure beside ours: those that fit, and the next larger one.

        Args:
            uniform: All uniform plans, by format.
            first: The solver's plan.
        """
        most = self.most(first)
        larger = sorted(self.size_of(p) for p in uniform.values() if self.size_of(p) > most)
        limit = larger[0] if larger else most
        return {name: plan for name, plan in uniform.items() if self.size_of(plan) <= limit}

    def most(self, first: Plan) -> float:
        """The most that :meth:`size_of` may be."""
        return first.budget.bytes

    def plan(
        self,
        table: SensitivityTable,
        problem: Problem,
        solution: Solution,
        budget: BudgetRef,
        solver: str | None = None,
        command: str | None = None,
    ) -> Plan:
        """A solution of the problem, written down."""
        weights, cache = self.parted(problem, solution)
        return plan_from_choice(
            table,
            weights,
            solver or self.asked.solver,
            goal=self.name,
            lower_bound=solution.lower_bound,
            budget=budget,
            kv_cache=cache,
            resident_bytes=self.resident_bytes(table, weights),
            latency=self.latency_of(table, weights),
            runtime=self.limits.rules.name if self.limits.rules else None,
            note=solution.note or None,
            command=command,
        )

    def parted(
        self, problem: Problem, solution: Solution
    ) -> tuple[NDArray[np.intp], KVCache | None]:
        """The weights' choice, intp [U], and the caches'."""
        return solution.choice, None

    def resident_bytes(self, table: SensitivityTable, choice: NDArray[np.intp]) -> int | None:
        """Bytes of a plan's weights on the device; None where they count as stored."""
        return None

    def latency_of(self, table: SensitivityTable, choice: NDArray[np.intp]) -> Latency | None:
        """Time of a plan; None if nothing says how long anything takes."""
        return self.limits.latency_of(table, choice)


GOALS: Registry[type[Goal]] = Registry("goal", __name__)


def goal_class(asked: Asked) -> type[Goal]:
    """The goal that was asked for.

    Raises:
        ValueError: If it is none's.
    """
    for name in GOALS.names():
        if GOALS.get(name).matches(asked):
            return GOALS.get(name)
    raise ValueError("Nothing was asked for: give a --budget, --vram, --max-kl or --max-ppl.")

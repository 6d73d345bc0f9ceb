"""What a run is asked for, as a problem and a number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..models.kv_cache import KV_BITS, kv_bytes_per_token
from ..search.budget import Budget
from ..search.conflicts import explain_infeasible, feasible
from ..search.fastest import by_time, describe_time
from ..search.kv import KVTable, memory_budget, with_kv
from ..search.limits import Limits, build_problem
from ..search.memory import Family, resident_bytes
from ..search.plan import BudgetRef, Latency, Plan
from ..search.problem import Problem
from ..search.solve import outside_bytes
from ..search.solvers import SOLVERS
from ..sensitivity.table import SensitivityTable
from .prepare import Work
from .settings import SearchSettings

SEVERAL_LIMITS = ("certified", "highs", "ilp")  # solvers that take more than a number of bytes
MIXED_ROWS = ("certified", "dp", "greedy", "highs", "ilp")  # that need no weights per unit


class Goal:
    """What is asked for, as a problem and a number of bytes.

    Args:
        search: The settings.
        limits: Their limits.
        work: The model and its units.

    Raises:
        ValueError: If the solver has another goal, or the model has no KV cache to plan.
    """

    def __init__(self, search: SearchSettings, limits: Limits, work: Work) -> None:
        if search.solver == "bisection":
            raise ValueError(
                "The 'bisection' solver looks for a predicted KL: use it with `bitplan solve "
                "--max-kl`. `bitplan search --max-kl` finds the smallest plan of a measured KL."
            )
        if search.max_ppl is not None and not work.model.is_language_model:
            raise ValueError(f"--max-ppl: {work.model.id} reads no text. Use --max-kl.")
        if search.vram is not None and not work.model.is_language_model:
            raise ValueError(
                f"--vram plans a KV cache, and {work.model.id} reads no text. Use --budget."
            )
        self.search, self.limits, self.work = search, limits, work
        self.kv: KVTable | None = None
        if search.vram is not None:
            config = getattr(work.model.module, "config", None)
            size = kv_bytes_per_token(config, KV_BITS)
            zero = np.zeros(size.shape)
            layers = tuple(f"layer {i}" for i in range(len(size)))
            self.kv = KVTable(layers, KV_BITS, size, zero, zero)  # prices come later
        self.budget = Budget.parse(search.vram or search.budget or "1000bpw")

    @property
    def measures(self) -> bool:
        """Whether the solver searches on measured KL."""
        return bool(getattr(SOLVERS.get(self.search.solver), "measures", False))

    def problem(self, table: SensitivityTable) -> Problem:
        """The problem over weights, and caches if they share the budget."""
        problem = build_problem(self.limits.for_runtime(table), self.limits)
        if self.search.solver not in SEVERAL_LIMITS:
            problem.require_bytes_only(self.search.solver)
        if self.search.vram is not None and self.search.solver not in MIXED_ROWS:
            raise ValueError(
                f"The solver {self.search.solver!r} cannot plan a KV cache together with weights. "
                f"Use one of {', '.join(MIXED_ROWS)} with --vram."
            )
        if self.measures and self.search.budget is None:
            raise ValueError(
                f"The solver {self.search.solver!r} needs a --budget. Use 'certified' for "
                "--vram and quality targets."
            )
        if self.kv is None:
            return problem
        if self._laid_out:
            problem = replace(problem, bytes=resident_bytes(table, self.family))
        return with_kv(problem, self.kv, self.search.context, self.search.batch)

    def resolve(self, problem: Problem) -> BudgetRef:
        """The budget in bytes; without one, those of the largest useful plan.

        Raises:
            ValueError: If not even the smallest plan fits.
        """
        table = self.work.blank_table()
        if self.search.vram is not None:
            memory = self.budget.resolve(table.weights)
            outside = table.provenance.outside_bytes or 0
            size = memory_budget(problem, memory, outside, self.search.context)
            return BudgetRef(text=f"{self.budget.text} of memory", bytes=size)
        if self.search.budget is None:
            most = problem.evaluate(problem.best_choice(), np.inf).bytes
            if self.search.fastest:
                most = int(np.where(problem.allowed, problem.bytes, 0).max(axis=1).sum())
            return BudgetRef(text=self.target, bytes=most)
        size = self.budget.resolve(table.weights, outside_bytes(table, self.budget))
        problem.check_feasible(size)
        if problem.constraints and not feasible(problem, size):
            raise ValueError(explain_infeasible(problem, size))
        return BudgetRef(text=self.budget.text, bytes=size)

    def sized(
        self, problem: Problem, table: SensitivityTable
    ) -> tuple[Problem, Callable[[int], str]]:
        """The problem whose "bytes" are what to have little of, and how to say an amount of it."""
        if not self.search.fastest:
            return problem, lambda size: f"{size:,} B"
        return by_time(problem, self.limits.milliseconds(table, problem.allowed)), describe_time

    def resident_bytes(self, table: SensitivityTable, choice: NDArray[np.intp]) -> int | None:
        """Bytes of a plan's weights on the device; None where they count as stored."""
        if not self._laid_out:
            return None
        held = resident_bytes(table, self.family)
        return int(held[np.arange(len(choice)), choice].sum())

    @property
    def _laid_out(self) -> bool:
        """Whether weights count as bitplan's kernels hold them; other runtimes have their own."""
        return self.search.vram is not None and self.limits.rules is None

    @property
    def family(self) -> Family:
        """What kind of device holds the weights: that of ``--latency-device``, else a GPU."""
        return self.limits.device.family if self.limits.device else "nvidia"

    def latency_of(self, table: SensitivityTable, choice: NDArray[np.intp]) -> Latency | None:
        """Time of a plan; where the fastest is wanted, rivals must keep it."""
        latency = self.limits.latency_of(table, choice)
        if latency is None or not self.search.fastest:
            return latency
        return latency.model_copy(update={"max_ms": latency.ms})

    def size_of(self, plan: Plan) -> float:
        """What the goal wants little of: bytes, or milliseconds."""
        if self.search.fastest:
            assert plan.latency is not None
            return plan.latency.ms
        return plan.total_bytes

    @property
    def target(self) -> str:
        """The quality target in words."""
        end = ", fastest" if self.search.fastest else ""
        if self.search.max_kl is not None:
            return f"KL <= {self.search.max_kl:g}{end}"
        return f"perplexity <= {self.search.max_ppl:g}{end}"

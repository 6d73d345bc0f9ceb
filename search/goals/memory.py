"""The least KL of weights and KV cache together in a device's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...sensitivity.table import SensitivityTable
from ..budget import Budget
from ..coverage import check_coverage
from ..kv import memory_budget, split_choice, with_kv
from ..memory import Family, resident_bytes
from ..plan import BudgetRef, KVCache, Plan
from ..problem import Problem, Solution
from ..solvers import abilities, solvers_that
from . import GOALS, Asked, Goal, ModelFacts

MOST_RIVALS = 6  # uniform plans: every pair of widths would be too many to measure


@GOALS.register("memory", plans_cache=True)
class OfMemory(Goal):
    """The best plan of weights and KV cache that share a memory."""

    name = "memory"
    resampled = False

    def __init__(self, asked: Asked, model: ModelFacts) -> None:
        super().__init__(asked, model)
        if not model.reads_text or model.cache is None:
            raise ValueError(
                f"--vram plans a KV cache, and {model.id} reads no text. Use --budget."
            )

    @classmethod
    def matches(cls, asked: Asked) -> bool:
        """Whether a memory was given."""
        return asked.vram is not None

    def problem(self, table: SensitivityTable) -> Problem:
        """Weights as the device holds them, and one row per layer's cache.

        Raises:
            ValueError: As that of every goal; or if the solver plans no caches.
        """
        if not abilities(self.asked.solver).mixed_rows:
            raise ValueError(
                f"The solver {self.asked.solver!r} cannot plan a KV cache together with weights. "
                f"Use one of {', '.join(solvers_that('mixed_rows'))} with --vram."
            )
        problem = super().problem(table)
        if self._laid_out:
            seen = self.limits.for_runtime(table)
            problem = replace(problem, bytes=resident_bytes(seen, self._family))
        assert self.cache is not None
        return with_kv(problem, self.cache, self.asked.context, self.asked.batch)

    def resolve(self, problem: Problem, table: SensitivityTable) -> BudgetRef:
        """What the rest of the model leaves of the memory.

        Raises:
            ValueError: If not even the smallest plan fits.
        """
        memory = Budget.parse(self.asked.vram or "")
        check_coverage(table, memory)
        size = memory.resolve(table.weights)
        outside = table.provenance.outside_bytes or 0
        return BudgetRef(
            text=f"{memory.text} of memory",
            bytes=memory_budget(problem, size, outside, self.asked.context),
            kind="memory",
            memory=size,
        )

    def rivals(self, uniform: Mapping[str, Plan], first: Plan) -> dict[str, Plan]:
        """The MOST_RIVALS uniform plans that fit and are predicted to be best."""
        fitting = [name for name, plan in uniform.items() if self.size_of(plan) <= self.most(first)]
        best = sorted(fitting, key=lambda name: uniform[name].predicted_kl)[:MOST_RIVALS]
        return {name: uniform[name] for name in best}

    def parted(
        self, problem: Problem, solution: Solution
    ) -> tuple[NDArray[np.intp], KVCache | None]:
        """The weights' choice, intp [U], and the caches'."""
        weights, bits = split_choice(problem, solution.choice)
        rows = np.arange(len(weights), len(problem.units))
        picked = solution.choice[len(weights) :]
        cache = KVCache(
            bits=bits,
            context=self.asked.context,
            batch=self.asked.batch,
            bytes=int(problem.bytes[rows, picked].sum()),
            predicted_kl=float(problem.loss[rows, picked].sum()),
        )
        return weights, cache

    def resident_bytes(self, table: SensitivityTable, choice: NDArray[np.intp]) -> int | None:
        """Bytes of a plan's weights on the device; None where another runtime holds them."""
        if not self._laid_out:
            return None
        held = resident_bytes(table, self._family)
        return int(held[np.arange(len(choice)), choice].sum())

    @property
    def _laid_out(self) -> bool:
        """Whether weights count as bitplan's kernels hold them; other runtimes have their own."""
        return self.limits.rules is None

    @property
    def _family(self) -> Family:
        """What kind of device holds the weights: that of ``--latency-device``, else a GPU."""
        return self.limits.device.family if self.limits.device else "nvidia"

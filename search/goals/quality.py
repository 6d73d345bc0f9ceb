"""The smallest plan of a measured quality."""

from __future__ import annotations

import math

import numpy as np

from ...sensitivity.table import SensitivityTable
from ..coverage import check_coverage
from ..plan import BudgetRef, Plan
from ..problem import Problem
from . import GOALS, Asked, Goal, ModelFacts


@GOALS.register("quality")
class OfQuality(Goal):
    """The fewest bytes within a measured KL or perplexity.

    Attributes:
        most_kl: The most measured KL, nats per token: for a perplexity that of the plan that was
            found to reach it, None before.
    """

    name = "quality"
    is_target = True

    def __init__(self, asked: Asked, model: ModelFacts) -> None:
        super().__init__(asked, model)
        if asked.max_ppl is not None and not model.reads_text:
            raise ValueError(f"--max-ppl: {model.id} reads no text. Use --max-kl.")
        self.most_kl = asked.max_kl

    @classmethod
    def matches(cls, asked: Asked) -> bool:
        """Whether a quality was given, of any size."""
        return not asked.fastest and (asked.max_kl is not None or asked.max_ppl is not None)

    @property
    def text(self) -> str:
        """The target in words."""
        if self.asked.max_kl is not None:
            return f"KL <= {self.asked.max_kl:g}"
        return f"perplexity <= {self.asked.max_ppl:g}"

    def resolve(self, problem: Problem, table: SensitivityTable) -> BudgetRef:
        """The target, and the bytes of the largest useful plan: more are never needed."""
        check_coverage(table, None)
        most = problem.evaluate(problem.best_choice(), np.inf).bytes
        return BudgetRef(text=self.text, bytes=most, kind="target")

    def settled(self, budget: BudgetRef, size: int) -> BudgetRef:
        """The target, with the bytes of the smallest plan that was found to reach it."""
        return budget.model_copy(update={"bytes": size})

    def accepts(self, plan: Plan, kl: float) -> bool:
        """Whether a plan is as small as asked for and within the target."""
        return super().accepts(plan, kl) and self.most_kl is not None and kl <= self.most_kl

    @property
    def needs_original(self) -> bool:
        """Whether the target depends on the original's perplexity."""
        return self.asked.max_kl is None

    def target(self, ppl_original: float | None) -> tuple[float, str]:
        """The most that :meth:`loss_of` may be, nats per token, and its name.

        Args:
            ppl_original: Perplexity of the original model; None if it has none.

        Raises:
            ValueError: If a perplexity is asked for that is not above the original's.
        """
        most = self.asked.max_ppl
        if self.asked.max_kl is not None or most is None:
            return self.asked.max_kl or 0.0, "KL"
        if ppl_original is None or most <= ppl_original:
            raise ValueError(
                f"--max-ppl {most:g} is not above the original's perplexity"
                + (f" of {ppl_original:.4g}." if ppl_original else ": it has none. Use --max-kl.")
            )
        return math.log(most / ppl_original), "log perplexity increase"

    def loss_of(self, kl: float, ppl: float | None, ppl_original: float | None) -> float:
        """What the target limits, of a measured plan: KL, or log perplexity above the original's.

        Raises:
            ValueError: If a perplexity is asked for of a model that has none.
        """
        if self.asked.max_kl is not None:
            return kl
        if ppl is None or ppl_original is None:
            raise ValueError("--max-ppl needs a language model. Use --max-kl.")
        return math.log(ppl / ppl_original)

"""Which plans a plan is compared with, and what was measured of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..search.plan import Plan
from .words import UNIFORM


class Comparison(NamedTuple):
    """One plan of the comparison table; measured numbers are None where not measured.

    KL is in nats per token.  ``fits`` says whether the plan is within the budget; ``difference``
    is its measured KL minus that of the plan in question, paired over sequences.
    """

    name: str
    bytes: int
    bpw: float
    fits: bool
    predicted_kl: float
    kl: float | None = None
    kl_stderr: float | None = None
    ppl: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None

    @property
    def uniform(self) -> bool:
        """Whether every unit has the same format."""
        return self.name.startswith(UNIFORM)


def comparison(plan: Plan, uniform: Sequence[tuple[str, int, float]] = ()) -> list[Comparison]:
    """The plan first, then every measured baseline and every other uniform plan by size.

    Predicted next to measured KL, row by row, is the check of the sensitivity metric.

    Args:
        plan: The plan.
        uniform: Format, bytes and predicted KL of every uniform plan, measured or not.
    """
    measured = plan.measured
    own = Comparison("this plan", plan.bytes, plan.bpw, True, plan.predicted_kl)
    if measured is not None:
        own = own._replace(kl=measured.kl, kl_stderr=measured.kl_stderr, ppl=measured.ppl)
    rows = baselines(plan)
    known = {row.name for row in rows}
    for name, nbytes, predicted in uniform:
        if UNIFORM + name not in known:
            bpw, fits = 8 * nbytes / plan.weights, nbytes <= plan.budget.bytes
            rows.append(Comparison(UNIFORM + name, nbytes, bpw, fits, predicted))
    return [own, *sorted(rows, key=lambda row: row.bytes)]


def baselines(plan: Plan) -> list[Comparison]:
    """The measured baselines of a plan, by size."""
    rows = [
        Comparison(
            name=b.name,
            bytes=b.bytes,
            bpw=8 * b.bytes / plan.weights,
            fits=b.bytes <= plan.budget.bytes,
            predicted_kl=b.predicted_kl,
            kl=b.kl,
            kl_stderr=b.kl_stderr,
            ppl=b.ppl,
            difference=b.difference,
            difference_stderr=b.difference_stderr,
        )
        for b in plan.baselines
    ]
    return sorted(rows, key=lambda row: row.bytes)


def best_uniform(rows: Sequence[Comparison]) -> Comparison | None:
    """The uniform plan with the lowest KL that fits the budget: measured ones before predicted."""
    fitting = [row for row in rows if row.uniform and row.fits]
    measured = [row for row in fitting if row.kl is not None]
    return min(
        measured or fitting,
        key=lambda row: row.predicted_kl if row.kl is None else row.kl,
        default=None,
    )

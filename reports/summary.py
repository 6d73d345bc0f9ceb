"""The plan in a few words, and the plans it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..search.budget import format_bytes
from ..search.plan import Plan
from .words import UNIFORM, number, with_error
from .words import gap as gap_in_words


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
    known = {row.name for row in rows} | {UNIFORM + (only_format(plan) or "")}
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


def only_format(plan: Plan) -> str | None:
    """The format of a plan that uses a single one, else None."""
    formats = set(plan.assignments.values())
    return formats.pop() if len(formats) == 1 else None


def facts(plan: Plan, rows: Sequence[Comparison]) -> list[tuple[str, str]]:
    """What to know about a plan, as pairs of a name and a phrase.

    Args:
        plan: The plan.
        rows: Its rivals, from :func:`comparison`.
    """
    before = 2 * plan.weights
    size = f"{format_bytes(before)} at 16 bits → "
    size += f"{format_bytes(plan.bytes)} ({100 * plan.bytes / before:.1f} %)"
    unit = "nats per token"
    predicted = with_error(plan.predicted_kl, plan.predicted_kl_stderr)
    measured, ppl = "not measured", None
    if (held_out := plan.measured) is not None:
        measured = f"{with_error(held_out.kl, held_out.kl_stderr)} {unit}"
        measured += f" on {held_out.tokens:,} held-out tokens"
        ppl = held_out.ppl
    lines = [
        ("size", size),
        ("bits per weight", f"{plan.bpw:.3f} (budget {plan.budget.text})"),
        ("KL predicted", f"{predicted} {unit}"),
        ("KL measured", measured),
        ("optimality", gap_in_words(plan.gap)),
    ]
    if same := only_format(plan):
        lines.append(("format", f"{same} for every unit"))
    if rival := best_uniform(rows):
        lines.append(("other uniform" if same else "best uniform", describe_rival(rival)))
    if ppl is not None:
        original = held_out.ppl_original if held_out else None
        before_text = f" (original {number(original)})" if original is not None else ""
        lines.append(("perplexity", number(ppl) + before_text))
    return lines


def describe_rival(rival: Comparison) -> str:
    """A rival in words: format, size, KL, and how much worse it is."""
    name = f"{rival.name.removeprefix(UNIFORM)}, {format_bytes(rival.bytes)}"
    if rival.kl is None:
        return f"{name}: KL {number(rival.predicted_kl)} predicted"
    text = f"{name}: KL {with_error(rival.kl, rival.kl_stderr)} measured"
    if rival.difference is not None:
        text += f", paired difference {with_error(rival.difference, rival.difference_stderr, True)}"
    return text

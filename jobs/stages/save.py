"""The plan, and the frontier it lies on."""

from __future__ import annotations

from ...search.frontier import Frontier
from ...search.limits import build_problem
from ..context import Context, Stage


def save(context: Context) -> None:
    """Write both, and remove what told of an earlier plan in the folder."""
    for stale in context.folder.reports:
        stale.unlink(missing_ok=True)
    weights = build_problem(context.table, context.goal.limits)
    Frontier.from_problem(weights, context.plan.model).save(context.folder.frontier)
    context.plan.save(context.folder.plan)


STAGE = Stage("save", save)

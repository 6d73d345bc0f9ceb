"""The plan, what its rounding bought, and the frontier it lies on."""

from __future__ import annotations

from ...search.frontier import Frontier
from ...search.limits import build_problem
from ...sensitivity.nearest import nearest_prices
from ..context import Context, Stage
from ..materialize import assignment_formats


def save(context: Context) -> None:
    """Write both, and remove what told of an earlier plan in the folder."""
    for stale in context.folder.reports:
        stale.unlink(missing_ok=True)
    weights = build_problem(context.table, context.goal.limits)
    Frontier.from_problem(weights, context.plan.model).save(context.folder.frontier)
    nearest = nearest_prices(
        context.work.renderer, context.table.units, assignment_formats(context.plan)
    )
    context.plan = context.plan.model_copy(update={"nearest_kl": dict(nearest)})
    context.plan.save(context.folder.plan)


STAGE = Stage("save", save)

"""How sure the plan is of every unit: the same search on resampled prices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...search.confidence import Confidence, bootstrap
from ...search.solvers import is_exact
from ...sensitivity.shrinkage import Shrinkage
from ..context import Context, Stage


def confidence(context: Context) -> None:
    """Resample the prices that the shipped plan was solved from, and say what changes."""
    path, table, refined = context.folder.confidence, context.table, context.refined
    path.unlink(missing_ok=True)
    if not context.search.bootstrap:
        return
    if why := _why_not(context):
        context.reporter.say(f"No bootstrap: {why}")
        return
    problem, choice = context.problem, context.solution.choice
    reprice, sequences = None, None
    if context.plan.refinement is not None and refined is not None and refined.last is not None:
        reprice, sequences = refined.last.loss, len(refined.last.prices.first)
        loss = np.where(problem.allowed, refined.last.loss(), np.inf)
        problem = replace(problem, loss=loss, scores=None)
        choice = refined.choice
    elif table.scores is not None and table.diagonal is not None:
        kinds = [unit.kind for unit in table.units]
        shrinkage = Shrinkage(table.scores, table.diagonal, kinds)
        reprice, sequences = shrinkage.prices, len(table.scores)
    with context.reporter.bar("Bootstrap", context.search.bootstrap) as advance:
        found: Confidence = bootstrap(
            problem,
            context.budget.bytes,
            choice,
            reprice=reprice,
            sequences=sequences,
            resamples=context.search.bootstrap,
            seed=context.settings.seed,
            advance=advance,
        )
    found.save(path)
    for line in found.summary(context.words.drawn):
        context.reporter.say(line)


def _why_not(context: Context) -> str:
    """Why prices cannot be resampled; empty if they can."""
    plan, table, drawn = context.plan, context.table, context.words.drawn
    metric = table.provenance.metric
    if plan.solver == "uniform":
        return "a uniform plan measured best, which no price decides."
    if not is_exact(plan.solver):
        return f"resamples are solved exactly, which the {plan.solver!r} solver does not do."
    if table.scores is None or len(table.scores) < 2:
        return f"the metric {metric!r} has no scores of several {drawn}."
    squares = (table.scores.astype(np.float64) ** 2).mean(axis=0)
    if table.diagonal is None and not np.allclose(squares, table.kl, rtol=1e-3):
        return f"prices of the metric {metric!r} are no mean of squares."
    if context.problem.constraints or not context.goal.resampled:
        return "only plans under a single budget of bytes are resampled."
    return ""


STAGE = Stage("confidence", confidence)

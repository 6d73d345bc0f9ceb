"""All plans and every uniform rival on the same held-out data; the best ships.

That one and its best rival are measured on a second text, too: does it hold for another kind?
"""

from __future__ import annotations

import numpy as np

from ...search.kv import uniform_choices
from ...search.plan import Plan
from ..context import Context, Stage


def validate(context: Context) -> None:
    """Measure, paired; figures of an earlier run are found in the folder."""
    for fmt, plan in _rivals(context).items():
        context.plans[f"uniform {fmt}"] = plan
        context.uniform[f"uniform {fmt}"] = fmt
    context.plan = context.held_out.best(context.plans, context.goal, context.uniform)
    if (second := context.held_out_also) is not None:
        also = second.beside(context.plan, context.plans)
        context.plan = context.plan.model_copy(update={"measured_also": [also]})


def _rivals(context: Context) -> dict[str, Plan]:
    """Uniform plans to measure, by format; those that break a further limit are no rivals."""
    problem, bound = context.problem, context.solution.lower_bound
    rows = np.arange(len(problem.units))
    uniform = {
        fmt: context.written(problem, problem.evaluate(choice, bound), "uniform")
        for fmt, choice in uniform_choices(problem).items()
        if all(c.cost[rows, choice].sum() <= c.limit for c in problem.constraints)
    }
    ours = [(p.assignments, p.kv_cache) for p in context.plans.values()]
    others = {fmt: p for fmt, p in uniform.items() if (p.assignments, p.kv_cache) not in ours}
    return context.goal.rivals(others, context.first)


STAGE = Stage("validate", validate)

"""A better plan than one-shot prices can find: re-price at the plan, measure, repeat."""

from __future__ import annotations

from dataclasses import asdict

from ...search.plan import Refinement
from ...search.refine import Step
from ...search.refine import refine as run_refinement
from ..context import Context, Stage
from ..settings import REFINE_ABOVE, REFINE_STEPS

NO_LIMIT = 1 << 62  # tokens: every step measures what it needs


def refine(context: Context) -> None:
    """Refine the solver's plan; figures and prices of an earlier run are found in the folder."""

    def report(step: Step) -> None:
        context.job.log("refinement candidate", **asdict(step))
        context.reporter.say(
            f"Step {step.number}: {step.changed} units changed, KL {step.difference:+.4f} ± "
            f"{step.difference_stderr:.4f} {context.words.nats}"
            + (", accepted" if step.accepted else "")
        )

    problem, solution = context.problem, context.solution
    refined = context.refined = run_refinement(
        problem,
        context.budget.bytes,
        solution.choice,
        context.truth.linearize,
        context.truth.oracle(NO_LIMIT),
        steps=_steps(context),
        report=report,
    )
    if len(refined.choices) > 1:
        plan = context.written(problem, problem.evaluate(refined.choice, solution.lower_bound))
        note = Refinement(
            steps=len(refined.choices) - 1, kl_before=refined.kl[0], kl_after=refined.kl[-1]
        )
        context.plans["refined plan"] = plan.model_copy(update={"refinement": note})


def _steps(context: Context) -> int:
    """Steps to take: as asked; else some, where prices are too coarse for a plan they decide."""
    if not context.goal.takes_oracle:
        return 0
    if context.search.refine is not None:
        return context.search.refine
    if context.solution.loss <= REFINE_ABOVE or not context.solver.exact:
        return 0
    try:
        return REFINE_STEPS if context.truth else 0
    except ValueError as error:
        context.reporter.say(f"Not refined: {error}")
        return 0


STAGE = Stage("refine", refine, lambda context: _steps(context) > 0)

"""The best plan by prices; or by measured KL, for a solver that asks for it or a quality."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from ...search.blackbox.storage import shown
from ...search.blackbox.study import job_of, open_study, publish
from ...search.goals.quality import OfQuality
from ...search.problem import Problem, Solution
from ...search.quality import Tried, smallest_within
from ...search.solve import warn_of_spare_bytes
from ...search.solvers import SOLVERS
from ..context import Context, Stage


def solve(context: Context) -> None:
    """Solve for the bytes, or for the quality.

    Raises:
        ValueError: If there is no such plan.
    """
    context.problem = context.goal.problem(context.table)
    context.budget = context.goal.resolve(context.problem, context.table)
    if isinstance(context.goal, OfQuality):
        context.solution = _smallest(context, context.goal)
    elif context.solver.needs_oracle:
        context.solution = _on_model(context)
    else:
        run = SOLVERS.get(context.search.solver)
        size = context.budget.bytes
        context.solution = run(context.problem, size, seed=context.settings.seed)
        if not context.problem.constraints:
            warn_of_spare_bytes(context.problem, size)
    plan = context.written(context.problem, context.solution)
    context.plans[f"{context.search.solver} plan"] = plan
    if isinstance(context.goal, OfQuality) and context.goal.most_kl is None:
        found = context.held_out.measure({"the smallest plan": plan})["the smallest plan"]
        context.goal.most_kl = found.mean_kl  # which reaches the perplexity


def _on_model(context: Context) -> Solution:
    """A search on measured KL, which workers may share."""
    search, seed, size = context.search, context.settings.seed, context.budget.bytes
    storage = search.storage or f"sqlite:///{context.folder.study}"
    study = search.study or f"{context.folder.path.name}-{search.solver}-{size}-{seed}"
    title = f"Searching on measured KL ({search.solver})"
    with context.reporter.bar(title, search.search_tokens) as advance:
        oracle = context.truth.oracle(search.search_tokens, storage, study, advance)
        problem = replace(context.problem, oracle=oracle)
        if context.solver.objectives:
            _publish(context, problem, storage, study)
        return SOLVERS.get(search.solver)(problem, size, seed=seed)


def _publish(context: Context, problem: Problem, storage: str, study: str) -> None:
    """Leave everything that a worker elsewhere needs to know in the study."""
    solver = context.search.solver
    job = job_of(problem, context.budget.bytes, solver, context.settings.seed)
    search = replace(context.search, storage=None)  # its URL may hold a password
    recorded = {"profile": asdict(context.settings), "search": asdict(search)}
    model = context.table.provenance.model
    origin = {"model": model.model_dump(), "guard_sha256": context.truth.guard.sha256}
    publish(open_study(storage, study, solver), job | recorded | origin)
    context.reporter.say(
        f"Share the work: bitplan worker --storage '{shown(storage)}' --study {study}"
    )


def _smallest(context: Context, goal: OfQuality) -> Solution:
    """The smallest (or fastest) plan that measures within the target on held-out data."""
    problem, held_out = context.problem, context.held_out

    def measured(choice: NDArray[np.intp]) -> float:
        plan = context.written(problem, problem.evaluate(choice, np.inf))
        name = f"{plan.bpw:.2f} bpw"
        found = held_out.measure({name: plan})[name]
        return goal.loss_of(found.mean_kl, found.perplexity, held_out.ppl_original)

    if goal.needs_original:
        whole = context.written(problem, problem.evaluate(problem.best_choice(), np.inf))
        held_out.measure({"the largest plan": whole})
    target, what = goal.target(held_out.ppl_original)
    sized, amount = goal.sized(problem, context.table)

    def report(tried: Tried) -> None:
        context.reporter.say(
            f"{amount(tried.bytes)}: predicted {tried.predicted:.4g}, measured {tried.measured:.4g}"
        )

    found = smallest_within(
        sized,
        target,
        measured,
        what=what,
        solver=context.search.solver,
        seed=context.settings.seed,
        report=report,
        amount=amount,
    )
    solution = replace(problem.evaluate(found.choice, found.lower_bound), note=found.note)
    context.budget = goal.settled(context.budget, solution.bytes)
    return solution


STAGE = Stage("solve", solve)

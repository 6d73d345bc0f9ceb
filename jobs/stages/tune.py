"""The plan that stands, with scales tuned by its KL to the original: one more candidate."""

from __future__ import annotations

from ...search.plan import Plan, Tuning
from ...sensitivity.tuning import Tuner
from ..context import Context, Stage
from ..materialize import assignment_formats
from ..rerounded import rerounded_renderer
from ..truth import TOP_K
from ..tuning import Check, Kept, Tuned, key_of, measure_on
from ..tuning import tune as run_tuning


def tune(context: Context) -> None:
    """Tune the plan that the stages before came to; an earlier run's scales are found.

    Raises:
        ValueError: If too few sequences are left to measure on.
    """
    plan = list(context.plans.values())[-1]
    inside, guard = context.inside_and_apart
    if context.work.seen is not None:
        inside = inside.joined(context.work.seen)
    steps, seed = context.search.tune, context.settings.seed
    definition = str(context.table.provenance.definition_sha256)
    definition += context.work.renderer.store.origin  # codes stay, and what made them decides
    key = key_of(plan, definition, inside, guard, steps, seed, TOP_K)
    kept = Kept(context.folder, key, assignment_formats(plan))
    found = kept.finished()
    if found is None:
        tuner = Tuner(
            context.work.model,
            rerounded_renderer(context.work.renderer, plan, context.folder),
            kept.assignment,
            inside,
            steps=steps,
            seed=seed,
        )
        if not tuner.count:
            context.reporter.say(f"Not tuned: {_formats(plan)} have no scales in float16.")
            return
        found = _tuned(context, tuner, kept)
    best = found.best
    assert best is not None and found.sha256 is not None
    nats = context.words.nats
    if not found.helps:
        context.reporter.say(
            f"Not tuned: the best scales, of step {best.step}, change the KL by "
            f"{best.difference:+.4f} ± {best.difference_stderr:.4f} {nats} on sequences apart, "
            "no clear gain. The plan keeps the scales it has."
        )
        return
    context.reporter.say(
        f"Tuned: KL {found.kl_before:.4f} → {best.kl:.4f} {nats} on sequences apart, in "
        f"{best.step} {'step' if best.step == 1 else 'steps'}"
    )
    note = Tuning(
        steps=best.step,
        tokens=found.tokens,
        kl_before=found.kl_before,
        kl_after=best.kl,
        sha256=found.sha256,
    )
    context.plans["tuned plan"] = plan.model_copy(update={"tuning": note})


def _tuned(context: Context, tuner: Tuner, kept: Kept) -> Tuned:
    """Run the tuning, or what is left of it."""
    _, guard = context.inside_and_apart

    def report(check: Check) -> None:
        context.job.log("tuning check", **check.model_dump())

    steps = context.search.tune
    with context.reporter.bar("Tuning scales", steps) as advance:
        measure = measure_on(context.work.model, guard, kept.assignment, TOP_K)
        return run_tuning(tuner, measure, steps, kept, advance=advance, report=report)


def _formats(plan: Plan) -> str:
    return ", ".join(sorted(set(plan.assignments.values())))


STAGE = Stage("tune", tune, lambda context: context.search.tune > 0)

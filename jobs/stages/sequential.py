"""The plan that stands, rounded again block by block: one more candidate."""

from __future__ import annotations

from ...search.plan import SequentialRounding
from ...sensitivity.sequential import Sequential
from ..context import Context, Stage
from ..materialize import assignment_formats
from ..rerounding import Course, Rerounded, key_of, reround
from ..truth import TOP_K
from ..tuning import measure_on


def sequential(context: Context) -> None:
    """Round the plan that solving and refinement came to again; an earlier run's is found.

    Raises:
        ValueError: If too few sequences are left to measure on.
    """
    plan = list(context.plans.values())[-1]
    work, seed = context.work, context.settings.seed
    assert work.seen is not None, "refused for methods that look at no data"
    _, guard = context.inside_and_apart
    origin = str(context.table.provenance.definition_sha256) + work.renderer.store.origin
    key = key_of(plan, origin, work.seen, guard, seed, TOP_K)
    course = Course(context.folder, key)
    found = course.finished() or _rounded(context, course)
    assert found.difference is not None and found.difference_stderr is not None
    nats = context.words.nats
    change = f"{found.difference:+.4f} ± {found.difference_stderr:.4f} {nats} on sequences apart"
    if not found.codes:
        context.reporter.say("Not rounded again: no matrix is used once for every token.")
        return
    if not found.helps:
        context.reporter.say(
            f"Not rounded again: block by block the KL changes by {change}, no clear gain. The "
            "plan keeps the codes it has."
        )
        return
    assert found.kl_before is not None and found.kl_after is not None and found.sha256 is not None
    context.reporter.say(
        f"Rounded again, block by block: KL {found.kl_before:.4f} → {found.kl_after:.4f} {nats} on "
        "sequences apart"
    )
    note = SequentialRounding(
        matrices=len(found.codes),
        kl_before=found.kl_before,
        kl_after=found.kl_after,
        sha256=found.sha256,
    )
    context.plans["sequential plan"] = plan.model_copy(update={"sequential": note})


def _rounded(context: Context, course: Course) -> Rerounded:
    """Round again, or what is left of it."""
    work, plan = context.work, list(context.plans.values())[-1]
    assert work.seen is not None
    _, guard = context.inside_and_apart
    assignment = assignment_formats(plan)
    again = Sequential(
        work.model,
        work.units,
        work.renderer,
        assignment,
        work.seen,
        seed=context.settings.seed,
        reporter=context.reporter,
    )
    found = reround(course, again, measure_on(work.model, guard, assignment, TOP_K))
    context.job.log(
        "sequential rounding",
        matrices=len(found.codes),
        difference=found.difference,
        difference_stderr=found.difference_stderr,
    )
    return found


STAGE = Stage("sequential", sequential, lambda context: context.search.sequential)

"""The main job: every stage from a model to a validated plan, in a folder that can be resumed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .._base.files import check_place
from .._base.progress import Reporter
from ..models.trust import allowed
from ..search.plan import Plan
from ..search.solvers import abilities
from ..sensitivity.table import SensitivityTable
from .context import Context
from .folder import RunFolder
from .job import Job
from .prepare import check, check_runtime, evaluation, goal_of, prepare, profiled, second_evaluation
from .settings import ProfileSettings, SearchSettings
from .stages import cache, confidence, profile, refine, save, sequential, solve, tune, validate

STAGES = (
    profile.STAGE,
    cache.STAGE,
    solve.STAGE,
    refine.STAGE,
    sequential.STAGE,
    tune.STAGE,
    validate.STAGE,
    save.STAGE,
    confidence.STAGE,
)


def run_profile(settings: ProfileSettings, run: Path, reporter: Reporter) -> SensitivityTable:
    """Profile a model into a run folder, or take the finished profile that is there.

    Raises:
        ValueError: If a name is unknown, another process works in the folder, or it holds a
            profile made with other settings.
    """
    argv = ["bitplan", "profile", settings.model]
    with allowed(settings.trust_remote_code):
        check(settings)
        with _job(run, argv, _recorded(settings), reporter) as job, job.stage("profile"):
            folder = RunFolder(run)
            return profiled(prepare(settings, reporter, folder), folder, reporter)


def run_search(
    settings: ProfileSettings, search: SearchSettings, run: Path, reporter: Reporter
) -> Plan:
    """The main job: profile, solve, refine, round again, tune, validate against rivals, save.

    Whatever can be checked without the slow profile is checked before it.  Every stage keeps what
    it found in the run folder: a run that was stopped at any point goes on from there.

    Returns:
        The plan that measured best among the solver's, the refined one, that rounded again, the
        tuned one and every uniform plan that fits the same bytes; the others are its baselines.

    Raises:
        ValueError: On bad input; nothing is left half-written.
    """
    argv = shlex.split(search.command) if search.command else ["bitplan", "search", settings.model]
    recorded = _recorded(settings) | {"search": asdict(replace(search, command=None))}
    with allowed(settings.trust_remote_code):
        check(settings, search)
        search.limits()  # a limit that cannot be is found out before the folder is made
        with _job(run, argv, recorded, reporter) as job:
            context = _begun(settings, search, RunFolder(run), job, reporter)
            for stage in STAGES:
                if stage.applies(context):
                    with job.stage(stage.name):
                        stage.run(context)
            return context.plan


def _recorded(settings: ProfileSettings) -> dict[str, Any]:
    """What a run folder keeps; not the trust in a model's code, which holds for one command."""
    return {"profile": asdict(replace(settings, trust_remote_code=False))}


def _begun(
    settings: ProfileSettings,
    search: SearchSettings,
    folder: RunFolder,
    job: Job,
    reporter: Reporter,
) -> Context:
    """The model loaded, and all found out that needs no profile."""
    work = prepare(settings, reporter, folder)
    check_runtime(work, search.runtime)
    goal = goal_of(search, work.model)
    blank = work.blank_table()
    goal.resolve(goal.problem(blank), blank)  # what cannot fit is found out here
    samples = evaluation(work.model, settings, search)
    context = Context(settings, search, goal, work, samples, folder, job, reporter)
    context.also = second_evaluation(work.model, settings, search, reporter)
    if search.refine or search.sequential or search.tune or abilities(search.solver).needs_oracle:
        _ = context.inside_and_apart  # is there enough text for that?
    return context


@contextmanager
def _job(
    run: Path, argv: list[str], settings: Mapping[str, Any], reporter: Reporter
) -> Iterator[Job]:
    check_place(run, "--out", inside=True)
    with Job(run, argv, settings) as job:
        reporter.listener = job
        try:
            yield job
        finally:
            reporter.listener = None

"""`bitplan search`: the main job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..jobs.settings import ProfileSettings, SearchSettings
from . import options
from .console import hint, out
from .derive import Given, derived
from .lazy import verb

app = verb()


@app.command()
@derived
def search(
    *,
    context_: typer.Context,
    run: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder; default runs/MODEL-GOAL.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder, with the settings it recorded."),
    ] = None,
    profile: Given[ProfileSettings],
    asked: Given[SearchSettings],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be read, held and computed, and stop."),
    ] = False,
    quiet: options.QuietOption = False,
) -> None:
    """The main job: profile, solve with a certificate, refine, validate on held-out text, report.

    After an interruption the same command, or --resume RUN, goes on where it stopped.
    """
    from .._base.progress import Reporter
    from ..jobs.folder import RunFolder
    from ..jobs.record import JobRecord
    from ..jobs.search import run_search
    from ..jobs.settings import read_settings
    from ..reports.html import write_report
    from ..reports.terminal import print_summary

    if resume is not None:
        options.check_alone(context_, "resume", "quiet", "trust_remote_code")
        run, record = resume, JobRecord.load(resume)
        settings, wanted = read_settings(record.settings)
        settings = replace(settings, trust_remote_code=profile["trust_remote_code"])
        wanted = replace(wanted, command=record.command.text)
    else:
        goals = (asked[name] for name in ("budget", "vram", "max_kl", "max_ppl"))
        budget = None if any(goal is not None for goal in goals) else "4.3bpw"
        wanted = asked.build(budget=budget, command=options.command())
        settings = options.profile_settings(profile, wanted.runtime)
        run = run or Path("runs") / f"{options.run_name(settings.model)}-{wanted.goal}"
    if dry_run:
        from ..jobs.forecast import forecast

        for line in forecast(settings, wanted):
            out.print(line, markup=False, soft_wrap=True)
        return
    plan = run_search(settings, wanted, run, Reporter(quiet))
    *_, report = write_report(run)
    print_summary(out, plan, {"report": report})
    same = () if plan.runtime is None else ("--for", plan.runtime)
    hint("Another budget, at once:", "solve", RunFolder(run).profile, *same, "--budget …")

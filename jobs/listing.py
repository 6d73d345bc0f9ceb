"""The runs below a folder: how far each is, and what it found."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .._base.progress import seconds_left
from ..search.plan import Plan
from .folder import RunFolder
from .job import read_log
from .lock import is_running
from .record import JobRecord, Status, age


@dataclass(frozen=True, slots=True)
class JobInfo:
    """One line of ``bitplan jobs``.

    Attributes:
        folder: The run folder.
        command: The command that ran it last.
        status: As it is now: a job whose process is gone is ``interrupted``.
        started: When it was first started, UTC.
        updated: When it last wrote its state, UTC.
        seconds: Time spent in stages.
        stage: The last stage entered, None before the first.
        doing: The stage's progress bar; empty without one.
        done: Steps of that bar done.
        total: Steps of that bar; 0 without one.
        eta: Seconds until the bar is full; None if it is not moving.
        budget: The budget of the job's plan, as it was written; None before there is a plan.
        bpw: Bits per weight of that plan.
        kl: Its measured KL, nats per token.
        error: First line of what it failed with; empty unless it failed.
    """

    folder: Path
    command: str
    status: Status
    started: str
    updated: str
    seconds: float
    stage: str | None
    doing: str
    done: int
    total: int
    eta: float | None
    budget: str | None
    bpw: float | None
    kl: float | None
    error: str


def list_jobs(root: Path) -> list[JobInfo]:
    """The jobs in ``root`` and the folders below it, the latest active first."""
    jobs = []
    for path in sorted(root.rglob(RunFolder(root).job.name)):
        with suppress(ValueError, OSError):  # not ours, of another version, or just removed
            jobs.append(_job_info(path.parent, JobRecord.load(path.parent)))
    return sorted(jobs, key=lambda job: job.updated, reverse=True)


def _job_info(folder: Path, record: JobRecord) -> JobInfo:
    running = record.status == "running" and is_running(folder)
    status: Status = "interrupted" if record.status == "running" and not running else record.status
    stage = record.stages[-1] if record.stages else None
    active = next((s for s in reversed(record.stages) if s.status == "running"), stage)
    eta = None
    if running and active is not None and active.status == "running":
        eta = seconds_left(active.bar_seconds, active.done, active.total)
        eta = None if eta is None else max(0.0, eta - age(record.updated))
    plan = _plan_of(folder, record)
    return JobInfo(
        folder=folder,
        command=record.command.text,
        status=status,
        started=record.started,
        updated=record.updated,
        seconds=record.seconds,
        stage=active.name if active else None,
        doing=active.doing if active else "",
        done=active.done if active else 0,
        total=active.total if active else 0,
        eta=eta,
        budget=plan.budget.text if plan else None,
        bpw=plan.bpw if plan else None,
        kl=plan.measured.kl if plan and plan.measured else None,
        error=_last_error(folder) if status == "failed" else "",
    )


def _last_error(folder: Path) -> str:
    """The first line of the error that the last failed run ended with."""
    failed = [e["fields"]["error"] for e in read_log(folder) if e["event"] == "run failed"]
    return failed[-1].partition("\n")[0].removeprefix("ValueError: ") if failed else ""


def _plan_of(folder: Path, record: JobRecord) -> Plan | None:
    """The job's plan; None before it is made, when the folder may hold an earlier job's."""
    try:
        plan = Plan.load(RunFolder(folder).plan)
    except (ValueError, OSError):
        return None
    return plan if plan.created >= record.started else None

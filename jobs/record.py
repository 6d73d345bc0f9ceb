"""A run folder as a job: one process at a time, a readable state, a log, and a way back in."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .._base.files import read_json_text, write_json
from .._base.progress import clock, seconds_left
from ..search.plan import PLAN_FILE, Plan

JOB_FILE = "job.json"
LOG_FILE = "job.log"
LOCK_FILE = "job.lock"
FIGURES = ("frontier", "allocation", "sensitivity", "prediction")  # that a report draws
REPORT_FILES = ("report.html", *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")))
WRITE_INTERVAL = 1.0  # seconds between two writes of progress
LOCK_TRIES = 5  # `is_running` holds a lock for an instant, which must not stop a run
LOCK_PAUSE = 0.05  # seconds between two tries

Status = Literal["running", "done", "failed", "interrupted"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Command(_Strict):
    """What was typed: the words, and the same as one line for a shell."""

    argv: list[str]
    text: str


class Stage(_Strict):
    """One stage of a job.

    Attributes:
        name: Such as ``profile``.
        status: ``done`` stays when a later run enters the stage again without any progress.
        started: When a run first entered it, UTC.
        seconds: Time spent in it, summed over runs.
        doing: What its current or last progress bar said.
        done: Steps of that bar done.
        total: Steps of that bar; 0 without one.
        bar_seconds: How long that bar has been there.
    """

    name: str
    status: Status
    started: str
    seconds: float = 0.0
    doing: str = ""
    done: int = 0
    total: int = 0
    bar_seconds: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether an earlier run finished it; what it made is in the folder."""
        return self.status == "done"


class JobRecord(_Strict):
    """The content of ``job.json``.

    Attributes:
        command: The latest command that ran the job.
        settings: What determines the job; the same settings go on with it.
        started: When it was first started with these settings, UTC.
        updated: When this was written, UTC.
        status: ``running`` is only true while a process holds the folder's lock.
        stages: The stages entered so far, in order.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    command: Command
    settings: dict[str, Any]
    started: str
    updated: str
    status: Status
    stages: list[Stage] = []

    @classmethod
    def load(cls, folder: Path) -> JobRecord:
        """Read a run folder's ``job.json``.

        Raises:
            ValueError: If there is none, or it is not one that this version reads.
        """
        path = folder / JOB_FILE
        if not path.is_file():
            raise ValueError(
                f"There is no job in {folder} (no {JOB_FILE}). `bitplan jobs` lists those there "
                "are, and `bitplan search MODEL --budget 4.3bpw` starts one."
            )
        try:
            return cls.model_validate_json(read_json_text(path, "job"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ValueError(
                f"{path} is not a job this version of bitplan can read: {where}: {first['msg']}. "
                "Run the command itself again; it goes on from the stages that are finished."
            ) from error


class RunLock:
    """Keeps a run folder to one process; the operating system frees it when that process ends.

    The lock is advisory, on ``job.lock``, which stays there and says who holds it or held it
    last.

    Args:
        folder: The run folder; made if it is not there.
        command: What the process does, for the message to others.

    Raises:
        ValueError: On entering, if another process holds it: which, since when, doing what.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self._folder = folder
        self._command = command

    def __enter__(self) -> RunLock:
        """Take the lock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / LOCK_FILE
        self._file = path.open("a+b", buffering=0)
        for left in reversed(range(LOCK_TRIES)):
            if _try_lock(self._file.fileno(), shared=False):
                break
            if not left:
                self._file.close()
                raise ValueError(self._refusal(path))
            time.sleep(LOCK_PAUSE)
        holder = {"pid": os.getpid(), "since": _now(), "command": self._command}
        self._file.truncate(0)
        self._file.write((json.dumps(holder) + "\n").encode())
        return self

    def __exit__(self, *_: object) -> None:
        """Free the lock."""
        self._file.close()

    def _refusal(self, path: Path) -> str:
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
            who = f"process {holder['pid']}, which has run `{holder['command']}` there since "
            who += f"{holder['since']} ({clock(_age(holder['since']))})"
            stop = f"stop it with `kill {holder['pid']}`"
        except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or was damaged
            who, stop = "another process", "stop it"
        return (
            f"{self._folder} is in use by {who}. Wait until it is done, {stop}, or choose another "
            "--out. `bitplan jobs` shows how far it is."
        )


class Job:
    """A run of a command in its folder: state, log and lock; also a Reporter's listener.

    Used as a context manager.  ``job.json`` is replaced in one rename at every change, so a
    process killed at any point leaves the state before the change or after it, and the next run
    with the same settings goes on from there.  A stage writes its result before it is marked
    done, so a stage that is marked done has one.

    Args:
        folder: The run folder.
        argv: The command, as in ``sys.argv``.
        settings: What determines the job, as JSON; other settings than the folder's last ones
            start a new list of stages.

    The record of a finished job stays until this one computes something or finishes: a command
    that is refused leaves it as it was, and only ``job.log`` tells of the attempt.

    Raises:
        ValueError: On entering, if another process runs in the folder.
    """

    def __init__(self, folder: Path, argv: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._record = JobRecord(
            command=Command(argv=list(argv), text=shlex.join(argv)),
            settings=json.loads(json.dumps(settings)),  # as it will be read: tuples are lists
            started=_now(),
            updated=_now(),
            status="running",
        )
        self._stage: Stage | None = None
        self._keeps_earlier = False  # job.json is a finished job's, which stays for now
        self._before = 0.0  # seconds spent in the stage by earlier runs
        self._entered = self._bar_began = self._written = 0.0  # time.monotonic()
        self._held = ExitStack()

    def __enter__(self) -> Job:
        """Take the folder and what an earlier run with the same settings left."""
        record = self._record
        with ExitStack() as stack:
            stack.enter_context(RunLock(self.folder, record.command.text))
            with suppress(ValueError):  # the first run, or a file only another version reads
                earlier = JobRecord.load(self.folder)
                if earlier.settings == record.settings:
                    record.started, record.stages = earlier.started, earlier.stages
                self._keeps_earlier = earlier.status == "done"
            for stage in record.stages:
                if stage.status == "running":  # its process was killed
                    stage.status = "interrupted"
            _end_last_line(self.folder / LOG_FILE)
            self._write()
            finished = [stage.name for stage in record.stages if stage.finished]
            self.log("run started", command=record.command.text, finished=finished)
            self._held = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write how it ended and free the folder."""
        with self._held:
            self._record.status = _outcome(error)
            self._keeps_earlier = self._keeps_earlier and error is not None
            self._write()
            self._log_end("run", error, seconds=_total(self._record))

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and mark how it ended.

        Yields:
            Its entry; ``finished`` on entry says that an earlier run finished it.
        """
        stages = self._record.stages
        stage = next((stage for stage in stages if stage.name == name), None)
        if stage is None:
            stage = Stage(name=name, status="running", started=_now())
            stages.append(stage)
        elif not stage.finished:
            stage.status = "running"
        self._stage, self._before, self._entered = stage, stage.seconds, time.monotonic()
        self._write()
        self.log("stage started", stage=name, finished_before=stage.finished)
        error: BaseException | None = None
        try:
            yield stage
        except BaseException as raised:
            error = raised
            raise
        finally:
            stage.status = _outcome(error)
            self._write()
            self._stage = None
            self._log_end("stage", error, stage=name, seconds=round(stage.seconds, 3))

    def log(self, event: str, level: str = "info", **fields: Any) -> None:
        """Append one line to ``job.log``: time, level, event and its fields."""
        entry = {"time": _now(), "level": level, "event": event, "fields": fields}
        line = json.dumps(entry, ensure_ascii=False, default=str) + "\n"
        with (self.folder / LOG_FILE).open("ab", buffering=0) as file:
            file.write(line.encode())  # one write: lines are whole or the last one is cut off

    def on_text(self, text: str) -> None:
        """Log a line that a Reporter printed."""
        self.log("message", text=text)

    def on_progress(self, description: str, done: int, total: int) -> None:
        """Keep a Reporter's bar in the current stage, written at most every WRITE_INTERVAL."""
        stage = self._stage
        if stage is None:
            return
        now = time.monotonic()
        if done == 0:
            self._bar_began = now
        stage.status = "running"
        stage.doing, stage.done, stage.total = description, done, total
        stage.bar_seconds = round(now - self._bar_began, 3)
        first, self._keeps_earlier = self._keeps_earlier, False
        if first or now - self._written >= WRITE_INTERVAL:
            with suppress(OSError):  # a full disk stops what must be saved, not a progress note
                self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._stage is not None:
            self._stage.seconds = round(self._before + self._written - self._entered, 3)
        self._record.updated = _now()
        if self._keeps_earlier:
            return
        write_json(self.folder / JOB_FILE, self._record.model_dump(by_alias=True))

    def _log_end(self, what: str, error: BaseException | None, **fields: Any) -> None:
        if error is None:
            self.log(f"{what} finished", **fields)
        else:
            text = f"{type(error).__name__}: {error}".removesuffix(": ")
            level = "error" if isinstance(error, Exception) else "warning"
            self.log(f"{what} {_outcome(error)}", level, **fields, error=text)


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
    for path in sorted(root.rglob(JOB_FILE)):
        with suppress(ValueError, OSError):  # not ours, of another version, or just removed
            jobs.append(_job_info(path.parent, JobRecord.load(path.parent)))
    return sorted(jobs, key=lambda job: job.updated, reverse=True)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's ``job.log``; a line cut off by a kill is left out."""
    path = folder / LOG_FILE
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def is_running(folder: Path) -> bool:
    """Whether a process holds the run folder's lock."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            return not _try_lock(file.fileno(), shared=True)
    except OSError:
        return False


def _job_info(folder: Path, record: JobRecord) -> JobInfo:
    running = record.status == "running" and is_running(folder)
    status: Status = "interrupted" if record.status == "running" and not running else record.status
    stage = record.stages[-1] if record.stages else None
    active = next((s for s in reversed(record.stages) if s.status == "running"), stage)
    eta = None
    if running and active is not None and active.status == "running":
        eta = seconds_left(active.bar_seconds, active.done, active.total)
        eta = None if eta is None else max(0.0, eta - _age(record.updated))
    plan = _plan_of(folder, record)
    return JobInfo(
        folder=folder,
        command=record.command.text,
        status=status,
        started=record.started,
        updated=record.updated,
        seconds=_total(record),
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
        plan = Plan.load(folder / PLAN_FILE)
    except (ValueError, OSError):
        return None
    return plan if plan.created >= record.started else None


def _total(record: JobRecord) -> float:
    return round(sum(stage.seconds for stage in record.stages), 3)


def _outcome(error: BaseException | None) -> Status:
    if error is None:
        return "done"
    return "failed" if isinstance(error, Exception) else "interrupted"


def _end_last_line(path: Path) -> None:
    """Give a log whose last line was cut off a line break, so that the next line is whole."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _age(when: str) -> float:
    """Seconds since a time written by :func:`_now`."""
    return (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()


if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 30  # far behind the content, which others may then read

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

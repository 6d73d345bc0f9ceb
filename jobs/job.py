"""A command at work in a run folder: its state, its log, and the way back in."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .folder import RunFolder
from .lock import RunLock
from .record import Command, JobRecord, Stage, Status, now

WRITE_INTERVAL = 1.0  # seconds between two writes of progress


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
            started=now(),
            updated=now(),
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
            _end_last_line(RunFolder(self.folder).log)
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
            self._log_end("run", error, seconds=self._record.seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and mark how it ended.

        Yields:
            Its entry; ``finished`` on entry says that an earlier run finished it.
        """
        stages = self._record.stages
        stage = next((stage for stage in stages if stage.name == name), None)
        if stage is None:
            stage = Stage(name=name, status="running", started=now())
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
        entry = {"time": now(), "level": level, "event": event, "fields": fields}
        line = json.dumps(entry, ensure_ascii=False, default=str) + "\n"
        with RunFolder(self.folder).log.open("ab", buffering=0) as file:
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
        self._record.updated = now()
        if self._keeps_earlier:
            return
        self._record.write(RunFolder(self.folder).job)

    def _log_end(self, what: str, error: BaseException | None, **fields: Any) -> None:
        if error is None:
            self.log(f"{what} finished", **fields)
        else:
            text = f"{type(error).__name__}: {error}".removesuffix(": ")
            level = "error" if isinstance(error, Exception) else "warning"
            self.log(f"{what} {_outcome(error)}", level, **fields, error=text)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's ``job.log``; a line cut off by a kill is left out."""
    path = RunFolder(folder).log
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _outcome(error: BaseException | None) -> Status:
    if error is None:
        return "done"
    return "failed" if isinstance(error, Exception) else "interrupted"


def _end_last_line(path: Path) -> None:
    """Give a log whose last line was cut off a line break, so that the next line is whole."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")

"""The state of a run as ``job.json`` records it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from .._base.records import Record, Strict
from .folder import RunFolder

Status = Literal["running", "done", "failed", "interrupted"]


class Command(Strict):
    """What was typed: the words, and the same as one line for a shell."""

    argv: list[str]
    text: str


class Stage(Strict):
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


class JobRecord(Record):
    """The content of ``job.json``.

    Attributes:
        command: The latest command that ran the job.
        settings: What determines the job; the same settings go on with it.
        started: When it was first started with these settings, UTC.
        updated: When this was written, UTC.
        status: ``running`` is only true while a process holds the folder's lock.
        stages: The stages entered so far, in order.
    """

    KIND: ClassVar[str] = "job"
    MEND: ClassVar[str] = (
        "Run the command itself again; it goes on from the stages that are finished."
    )

    schema_version: Literal[1] = Field(default=1, alias="schema")
    command: Command
    settings: dict[str, Any]
    started: str
    updated: str
    status: Status
    stages: list[Stage] = Field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> JobRecord:
        """Read a run folder's job.

        Raises:
            ValueError: If there is none, or it is not one that this version reads.
        """
        path = RunFolder(folder).job
        if not path.is_file():
            raise ValueError(
                f"There is no job in {folder} (no {path.name}). `bitplan jobs` lists those there "
                "are, and `bitplan search MODEL --budget 4.3bpw` starts one."
            )
        return cls.read(path)

    @property
    def seconds(self) -> float:
        """Time spent in stages."""
        return round(sum(stage.seconds for stage in self.stages), 3)


def now() -> str:
    """The time now, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def age(when: str) -> float:
    """Seconds since a time written by :func:`now`."""
    return (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()

"""Hand an Optuna study over to ``optuna-dashboard``, which shows trials better than we could."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from ..jobs.folder import RunFolder
from ..jobs.record import JobRecord
from ..jobs.settings import read_settings

PROGRAM = "optuna-dashboard"


def dashboard_command(run: Path, port: int) -> list[str]:
    """The command that shows the trials of a run's search.

    Args:
        run: A run folder.
        port: Where the dashboard is to listen, on this machine only.

    Raises:
        ValueError: If the run has no study.
    """
    study = RunFolder(run).study
    storage = f"sqlite:///{study}" if study.is_file() else None
    with suppress(ValueError):
        _, search = read_settings(JobRecord.load(run).settings)
        storage = search.storage or storage
    if storage is None:
        raise ValueError(
            f"{run} has no Optuna study: only searches with --solver tpe or nsga2 make one."
        )
    return [PROGRAM, storage, "--host", "127.0.0.1", "--port", str(port)]


def is_installed() -> bool:
    """Whether the dashboard can be started."""
    return shutil.which(PROGRAM) is not None

"""A worker on the trials of a search that was started elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from .._base.progress import Reporter
from ..models.trust import is_trusted
from ..search.blackbox.study import read_job, work
from .folder import RunFolder
from .prepare import prepare
from .settings import read_settings
from .truth import Truth, guarded


def run_worker(storage: str, study: str | None, device: str, reporter: Reporter) -> int:
    """Work on the trials of a search that was started elsewhere, until they are complete.

    Args:
        storage: Optuna storage URL.
        study: Name of the study; None if there is only one.
        device: ``cpu``, ``cuda`` or ``auto``; the worker's own.
        reporter: Where progress is shown.

    Returns:
        Trials this process completed.

    Raises:
        ValueError: If there is no such study, or the model here is another one.
    """
    job = read_job(storage, study)
    settings, search = read_settings(job)
    settings = replace(settings, device=device, trust_remote_code=is_trusted())
    loaded = prepare(settings, reporter)
    folded = loaded.provenance.fold is not None
    here, there = loaded.provenance.model.sha256, job["model"]["sha256"]
    if here != there:
        folds = " Scales to fold come out the same on the same kind of machine." if folded else ""
        raise ValueError(
            f"The weights of {settings.model} here (sha256 {here[:12]}) are not those of the "
            f"search ({there[:12]}). Give every worker the same model.{folds}"
        )
    inside, apart = guarded(loaded.model, settings, loaded.samples, search.guard)
    if apart.sha256 != job["guard_sha256"]:
        raise ValueError(
            f"The calibration text {settings.calibration!r} here is not that of the search. Give "
            "every worker the same file; the built-in prose differs between versions of Python."
        )
    table = search.limits().for_runtime(loaded.blank_table())
    loaded.renderer.complete(loaded.formats, reporter)
    with TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        truth = Truth(
            loaded.model, loaded.renderer, table, inside, apart, folder, settings.seed, reporter
        )
        return work(storage, job["study"], truth.oracle(search.search_tokens))

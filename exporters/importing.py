"""Another tool's choice of bits per layer, read from its files as a plan."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from math import nan
from pathlib import Path

from .._base.progress import Reporter
from ..jobs.folder import RunFolder
from ..models.find import find_matrices
from ..models.identity import state_sha256
from ..models.load import load_model
from ..models.workload import LoadedModel
from ..search.plan import BudgetRef, Plan
from ..sensitivity.provenance import ModelRef
from .configs.own_names import read_stored
from .targets import EXPORTERS, Exporter, Stored, shown_name


def import_plan(
    path: Path, model: str | LoadedModel | None = None, reporter: Reporter | None = None
) -> Plan:
    """Read the formats of a quantized file or folder as a plan.

    The plan holds what was chosen, not the tool's weights: measured or applied, it rounds the
    original model with our methods, so two tools' choices are compared like with like.

    Args:
        path: A GGUF file, or a folder with a quantized checkpoint.
        model: The original model, or its name. Without it the plan can be compared and drawn, but
            not measured.
        reporter: Where progress is shown.

    Raises:
        ValueError: If no target recognizes the file, or a module is not in the model.
    """
    name, exporter = recognize(path)
    if isinstance(model, str):
        if reporter:
            reporter.say(f"Loading {model}")
        model = load_model(model, "cpu")
    found = list(read_stored(exporter, path, model))
    if model is not None:
        _check_modules(path, found, model)
    size = sum(stored.fmt.stored_bytes(stored.shape) for stored in found)
    theirs = sum(stored.nbytes for stored in found)
    weights = sum(stored.shape[0] * stored.shape[1] for stored in found)
    if not weights:
        raise ValueError(f"{path} has no quantized matrix, so there is no plan in it.")
    note = f"read from {path.name} ({name})"
    if theirs != size:
        note += f", where it takes {theirs:,} B ({8 * theirs / weights:.3f} bpw)"
    if inexact := sum(not stored.exact for stored in found):
        note += f"; {inexact} matrices have no exact format here and stand in the nearest one"
    return Plan(
        model=_reference(path, model),
        assignments={stored.name: stored.fmt.name for stored in found},
        budget=BudgetRef(text=str(size), bytes=size),
        bytes=size,
        weights=weights,
        bpw=8 * size / weights,
        predicted_kl=nan,
        predicted_kl_stderr=nan,
        lower_bound_kl=nan,
        gap=nan,
        metric="none",
        solver=f"imported from {name}",
        rounding="rtn",
        calibration={},
        versions={"bitplan": version("bitplan")},
        note=note,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def recognize(path: Path) -> tuple[str, Exporter]:
    """The target whose file or folder this is.

    Raises:
        ValueError: If it is none's.
    """
    if not path.exists():
        raise ValueError(f"There is nothing at {path}. Give a GGUF file or a quantized folder.")
    known = []
    for name in EXPORTERS.names():
        exporter = EXPORTERS.get(name)()
        if exporter.recognizes(path):
            return shown_name(name), exporter
        if type(exporter).recognizes is not Exporter.recognizes:
            known.append(shown_name(name))
    plan = RunFolder(path).plan
    if plan.is_file():
        raise ValueError(f"{path} needs no import: it holds a plan of bitplan, {plan}.")
    raise ValueError(
        f"{path} is nothing that can be imported. Give a file or folder of: {', '.join(known)}."
    )


def _check_modules(path: Path, found: list[Stored], model: LoadedModel) -> None:
    shapes = {unit.name: unit.shapes[0] for unit in find_matrices(model.module)}
    for stored in found:
        if shapes.get(stored.name) != stored.shape:
            has = shapes.get(stored.name)
            raise ValueError(
                f"{path} has {stored.name!r} as a matrix {list(stored.shape)}, but in {model.id} "
                f"it {'is ' + str(list(has)) if has else 'does not exist'}. Give the --model that "
                "it was made from."
            )


def _reference(path: Path, model: LoadedModel | None) -> ModelRef:
    if model is None:
        return ModelRef(id=path.name, sha256="")
    return ModelRef(id=model.id, revision=model.revision, sha256=state_sha256(model.module))

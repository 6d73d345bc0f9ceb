"""A loaded model with what is asked of it, and its profile in a run folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from .._base.progress import Reporter
from ..models.find import find_units
from ..models.load import check_model, load_model
from ..models.rendering import Renderer
from ..models.samples import Samples, calibration_samples, check_text
from ..models.units import UnitInfo
from ..models.wording import words_of
from ..models.workload import LoadedModel
from ..quantizers.format import Format, resolve_formats
from ..quantizers.methods import METHODS
from ..quantizers.store import RENDERINGS_FOLDER
from ..search.blackbox.storage import shown
from ..search.budget import Budget
from ..search.solvers import SOLVERS
from ..sensitivity.estimate import price, provenance
from ..sensitivity.evidence import calibrated
from ..sensitivity.metrics import METRICS
from ..sensitivity.table import PROFILE_FILE, SensitivityTable, stored_bytes
from .settings import ProfileSettings, SearchSettings


@dataclass(frozen=True, slots=True)
class Work:
    """A loaded model, what is asked of it, and what that will be recorded as.

    Attributes:
        model: The original model.
        units: Its units.
        formats: Their candidate formats.
        samples: Calibration sequences.
        provenance: What the profile will say of itself.
        renderer: The one source of renderings of the run: what was priced is what is measured.
    """

    model: LoadedModel
    units: tuple[UnitInfo, ...]
    formats: tuple[Format, ...]
    samples: Samples
    provenance: dict[str, Any]
    renderer: Renderer

    def blank_table(self) -> SensitivityTable:
        """The table with exact bytes and no prices."""
        shape = (len(self.units), len(self.formats))
        return SensitivityTable(
            units=self.units,
            formats=tuple(fmt.name for fmt in self.formats),
            bytes=stored_bytes(self.units, self.formats),
            kl=np.zeros(shape),
            stderr=np.zeros(shape),
            provenance=self.provenance,
        )


def prepare(settings: ProfileSettings, reporter: Reporter, run: Path | None = None) -> Work:
    """Load a model, find its units and choose its calibration sequences.

    Codes that cannot be recomputed are kept in the folder ``run``, if there is one.

    Raises:
        ValueError: If a name is unknown, or the model or text cannot be used.
    """
    check(settings)
    reporter.say(f"Loading {settings.model}")
    model = load_model(settings.model, settings.device)
    units = find_units(model.module, settings.include, settings.exclude, settings.groups)
    samples = calibration_samples(
        model,
        settings.calibration,
        settings.sequences,
        settings.length,
        settings.seed,
        settings.batch_tokens,
    )
    _note_unused(model, settings)
    inside = sum(unit.weights for unit in units)
    everything = sum(p.numel() for p in model.module.parameters())
    reporter.say(
        f"{len(units)} units with {inside:,} weights; the other {everything - inside:,} "
        "parameters stay as they are"
    )
    origin = provenance(model, units, samples, settings.metric, settings.rounding, settings.seed)
    drawn = f"{samples.count:,} calibration {words_of(origin['calibration']).drawn}"
    if model.is_language_model:
        drawn += f": each price errs by about {(2 / samples.count) ** 0.5:.0%}"
    reporter.say(drawn)
    formats = resolve_formats(settings.formats, model.source_dtype)
    renderer = calibrated(
        model,
        units,
        settings.rounding,
        lambda: samples,
        samples.sha256,
        model_sha256=origin["model"]["sha256"],
        folder=run / RENDERINGS_FOLDER if run else None,
        reporter=reporter,
    )
    return Work(model, units, formats, samples, origin, renderer)


def check(settings: ProfileSettings, search: SearchSettings | None = None) -> None:
    """Find out what is plainly wrong before a run folder is made and a model is loaded.

    Raises:
        ValueError: If a name is unknown, a file is missing or a budget cannot be read.
    """
    METRICS.get(settings.metric)
    METHODS.get(settings.rounding)
    resolve_formats(settings.formats, "float32")
    check_model(settings.model, settings.device)
    check_text(settings.calibration, "calibration")
    if search is not None:
        SOLVERS.get(search.solver)
        check_text(search.evaluation, "evaluation")
        for budget in (search.budget, search.vram):
            if budget is not None:
                Budget.parse(budget)
        if search.storage is not None:
            shown(search.storage)  # raises if it is no URL


def _note_unused(model: LoadedModel, settings: ProfileSettings) -> None:
    """Say which settings of a text a model with batches of its own has no use for."""
    if model.is_language_model:
        return
    default = ProfileSettings(settings.model)
    names = ("sequences", "length", "batch_tokens")
    unused = [n for n in names if getattr(settings, n) != getattr(default, n)]
    if unused:
        flags = ", ".join("--" + name.replace("_", "-") for name in unused)
        warnings.warn(
            f"{flags} not used: {settings.model} brings its own batches, which are taken whole.",
            stacklevel=3,
        )


def profile_stage(work: Work, run: Path, reporter: Reporter) -> SensitivityTable:
    """Profile into a run folder, or take the finished profile that is there.

    Raises:
        ValueError: If the folder holds a profile made with other settings.
    """
    path = run / PROFILE_FILE
    if path.exists():
        table = SensitivityTable.load(path)
        _check_same(table, work.blank_table(), path)
        if not path.with_suffix(".json").exists():  # the disk was full
            table.save(path)
        reporter.say(f"Profile found in {path}, not computed again")
        work.renderer.complete(work.formats, reporter)  # what it priced is what will be measured
        return table
    run.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=run):
        pass  # a folder that cannot be written is found out before the slow part
    table = price(
        work.model,
        work.units,
        work.formats,
        work.renderer,
        work.samples,
        work.provenance,
        reporter,
    )
    table.save(path)
    return table


def _check_same(found: SensitivityTable, asked: SensitivityTable, path: Path) -> None:
    """Raise if a finished profile was made with other settings than those asked for."""
    before = {"units": [u.name for u in found.units], "formats": list(found.formats)}
    now = {"units": [u.name for u in asked.units], "formats": list(asked.formats)}
    before |= _flat(found.provenance)
    now |= _flat(asked.provenance)
    for key, value in now.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} was made with other settings ({key}: {_short(before.get(key))}, now "
                f"{_short(value)}). Choose another --out, which keeps this profile; deleting the "
                "file would lose it."
            )


def _flat(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance by dotted key, without what does not change a price."""
    flat: dict[str, Any] = {}
    for key, value in provenance.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): entry for name, entry in inner.items()}
    silent = ("versions", "layer_types", "model.id", "calibration.per")
    return {k: v for k, v in flat.items() if not k.startswith(silent)}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."

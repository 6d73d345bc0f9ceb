"""A run as its folder holds it: the plan, the frontier, the prices, and what was asked for."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..jobs.folder import RunFolder
from ..jobs.record import JobRecord
from ..jobs.settings import SearchSettings, read_settings
from ..models.units import UnitInfo
from ..quantizers.format import Format
from ..quantizers.runtimes import Rules, byte_count
from ..search.confidence import Confidence
from ..search.frontier import Frontier
from ..search.limits import Limits
from ..search.plan import Plan
from ..sensitivity.table import SensitivityTable


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run folder holds: the plan, the frontier it lies on and the prices behind both.

    Attributes:
        plan: The plan.
        frontier: The frontier.
        table: The prices, as the plan's runtime has them (``Limits.for_runtime``).
        confidence: What resampling did to this very plan; None if it was not resampled.
        settings: What the search was asked for; None where the folder does not say.
    """

    plan: Plan
    frontier: Frontier
    table: SensitivityTable
    confidence: Confidence | None = None
    settings: SearchSettings | None = None

    def __post_init__(self) -> None:
        """Check that plan, frontier and table are for the same model, units and formats.

        Raises:
            ValueError: If the plan or the frontier is not for what the profile is for.
        """
        model = self.table.provenance.model.sha256
        if self.plan.model.sha256 != model:
            raise _different("plan.json", f"it is for the model {self.plan.model.sha256}")
        for unit in self.table.units:
            for module in unit.modules:
                if module not in self.plan.assignments:
                    raise _different("plan.json", f"it has no format for {module!r}")
        size = sum(unit_bytes(self, unit) for unit in self.table.units)
        if size != self.plan.bytes:
            raise _different(
                "plan.json",
                f"it says {self.plan.bytes:,} B where its formats take {size:,} B (a version that "
                "counted otherwise made it, or it was edited)",
            )
        frontier = self.frontier
        if frontier.model is not None and frontier.model.sha256 != model:
            raise _different("frontier.json", f"it is for the model {frontier.model.sha256}")
        if frontier.units != tuple(unit.name for unit in self.table.units):
            raise _different("frontier.json", "it has other units")
        if frontier.formats != self.table.formats:
            raise _different("frontier.json", f"its formats are {', '.join(frontier.formats)}")

    @classmethod
    def load(cls, folder: Path) -> RunData:
        """Read a run folder; ``confidence.json`` and ``job.json`` may be absent.

        Raises:
            ValueError: If a file is missing or invalid, or they do not belong together.
        """
        run = RunFolder(folder)
        plan = Plan.load(run.plan)
        absent = [file.name for file in (run.profile, run.frontier) if not file.is_file()]
        if absent:
            raise ValueError(
                f"{folder} is no run: it lacks {' and '.join(absent)}. Give a folder that "
                "`bitplan search` wrote; `bitplan jobs` lists them."
            )
        table = _limits_of(plan).for_runtime(SensitivityTable.load(run.profile))
        return cls(
            plan=plan,
            frontier=Frontier.load(run.frontier),
            table=table,
            confidence=_confidence_of(run, plan, table),
            settings=_settings_of(folder, plan),
        )

    def format_of(self, unit: UnitInfo) -> str:
        """The format the plan gives to a unit: its modules share one."""
        return self.plan.assignments[unit.modules[0]]

    @property
    def limits(self) -> Limits:
        """The limits of the search; of a run that does not say, those of its runtime."""
        if self.settings is not None:
            return self.settings.limits()
        return _limits_of(self.plan)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of the table, and those of the plan that have no price."""
        planned = (self.format_of(unit) for unit in self.table.units)
        return tuple(dict.fromkeys((*self.table.formats, *planned)))

    @property
    def choice(self) -> NDArray[np.intp]:
        """intp [U], the plan as indices of :attr:`formats`."""
        index = {name: f for f, name in enumerate(self.formats)}
        return np.array([index[self.format_of(unit)] for unit in self.table.units], dtype=np.intp)


def _limits_of(plan: Plan) -> Limits:
    """The limits of the runtime that a plan is for."""
    return Limits(rules=Rules.load(plan.runtime) if plan.runtime else None)


def unit_bytes(run: RunData, unit: UnitInfo) -> int:
    """Bytes the plan stores a unit in."""
    fmt, count = Format.parse(run.format_of(unit)), byte_count(run.plan.runtime)
    return sum(count(fmt, shape) for shape in unit.shapes)


def _confidence_of(run: RunFolder, plan: Plan, table: SensitivityTable) -> Confidence | None:
    """The bootstrap of this plan; one of an earlier plan in the folder says nothing about it."""
    if not run.confidence.is_file():
        return None
    found = Confidence.load(run.confidence)
    names = tuple(unit.name for unit in table.units)
    formats = tuple(plan.assignments[unit.modules[0]] for unit in table.units)
    return found if (found.units, found.plan) == (names, formats) else None


def _settings_of(folder: Path, plan: Plan) -> SearchSettings | None:
    """The settings of the job that made the plan, as far as this version can read them."""
    with suppress(ValueError, OSError):
        record = JobRecord.load(folder)
        if plan.created >= record.started:  # else a later job has begun in the folder
            return read_settings(record.settings)[1]
    return None


def _different(file: str, how: str) -> ValueError:
    return ValueError(
        f"{file} does not belong to profile.safetensors: {how}. Run the search again, so that "
        "all files of the run are from the same search."
    )

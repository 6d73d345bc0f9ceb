"""What the parts of the search benchmark share: a model, texts, and figures that survive a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitplan._base.files import write_json
from bitplan._base.progress import Reporter
from bitplan.models.find import find_units
from bitplan.models.identity import state_sha256
from bitplan.models.load import load_model
from bitplan.models.measure import Measurement, measure, plan_runner, standard_error
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, calibration_samples, evaluation_samples
from bitplan.quantizers.candidates import DEFAULT_FORMATS
from bitplan.quantizers.format import resolve_formats
from bitplan.search.budget import Budget
from bitplan.search.oracle import Choice
from bitplan.sensitivity.metrics import Task
from bitplan.sensitivity.table import stored_bytes

BUDGETS = {"3.28bpw": "int3-g64-asym", "4.3bpw": "int4-g64-asym"}  # and the uniform format there
LENGTH = 128  # tokens per sequence
MEASURED_AT_ONCE = 8192  # tokens per pass: a plan's weights are rendered once for each
AT_ONCE = 8  # plans per measurement: what a kill can cost

Key = TypeVar("Key")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a work folder is for.

    Attributes:
        data: Folder that holds ``wikitext-2/``.
        work: Folder for everything that took long.
        model: Name of the model.
        sequences: Calibration sequences; two thirds as many more guard the refinement.
        tokens: Tokens of the test text to measure on.
        seeds: Calibration seeds of the scores.
    """

    data: Path
    work: Path
    model: str
    sequences: int
    tokens: int
    seeds: int = 3


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of the benchmark found.

    Attributes:
        tables: Rows by heading.
        targets: From :func:`target`.
        notes: What was measured and how.
    """

    tables: dict[str, list[Row]]
    targets: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Lab:
    """A model with its candidates, and plans measured on the test text.

    Raises:
        ValueError: If the work folder holds figures of other settings.
    """

    def __init__(self, settings: Settings, reporter: Reporter) -> None:
        self.settings, self.reporter, self.work = settings, reporter, settings.work
        self.model = load_model(settings.model, "cpu")
        self.units = find_units(self.model.module, ["model.layers.*"])
        self.weights = sum(unit.weights for unit in self.units)
        self.formats = resolve_formats(DEFAULT_FORMATS, self.model.source_dtype)
        self.bytes = stored_bytes(self.units, self.formats)
        self.renderer = Renderer(self.model.module, self.units)
        self.test = evaluation_samples(
            self.model, str(self._text("test")), settings.tokens, LENGTH, MEASURED_AT_ONCE
        )
        self._check_work()

    def calibration(
        self,
        seed: int,
        skip: int = 0,
        sequences: int | None = None,
        batch_tokens: int = 768,
    ) -> Samples:
        """Sequences of the validation text: those of the profile, or others after ``skip``."""
        return calibration_samples(
            self.model,
            str(self._text("valid")),
            sequences or self.settings.sequences,
            LENGTH,
            seed,
            batch_tokens,
            skip,
        )

    def task(self, seed: int, advance: Callable[[int], None]) -> Task:
        """What a metric looks at."""
        samples = self.calibration(seed)
        return Task(self.model, self.units, self.formats, self.renderer, samples, seed, advance)

    def max_bytes(self, budget: str) -> int:
        """Bytes of a budget in bits per weight."""
        return Budget.parse(budget).resolve(self.weights, 0)

    def bpw(self, choice: Choice) -> float:
        """Bits per weight of a plan, everything stored included."""
        size = self.bytes[np.arange(len(choice)), choice].sum()
        return float(8 * size / self.weights)

    def uniform(self, budget: str) -> Choice:
        """The uniform plan that a budget is compared with."""
        names = [fmt.name for fmt in self.formats]
        return np.full(len(self.units), names.index(BUDGETS[budget]), dtype=np.intp)

    def measure(self, plans: Mapping[Key, Choice], share: int = 1) -> dict[Key, Measurement]:
        """Full KL on the first 1 / ``share`` of the test text, on more where it is known.

        Plans measured before are read from the work folder.
        """
        samples = self.test.head(self.test.count // share)
        paths = {key: self._measurement(choice, share) for key, choice in plans.items()}
        missing = {path: plans[key] for key, path in paths.items() if not path.exists()}
        todo = list(missing)
        for start in range(0, len(todo), AT_ONCE):
            runs = {
                path.name: plan_runner(self.model, self.renderer, self._assignment(missing[path]))
                for path in todo[start : start + AT_ONCE]
            }
            title = f"Measuring plans {start + 1}-{start + len(runs)} of {len(todo)}"
            with self.reporter.bar(title, len(samples.batches) * (1 + len(runs))) as advance:
                found, _ = measure(self.model, runs, samples, lambda: advance(1))
            for name, result in found.items():
                stored = {"kl": result.kl.tolist(), "tokens": result.tokens}
                write_json(self.work / "measured" / name, stored)
        return {key: _read_measurement(path) for key, path in paths.items()}

    def _assignment(self, choice: Choice) -> dict[str, Any]:
        pairs = zip(self.units, choice.tolist(), strict=True)
        return {name: self.formats[f] for unit, f in pairs for name in unit.modules}

    def _measurement(self, choice: Choice, share: int) -> Path:
        digest = hashlib.sha256(choice.astype(np.int32).tobytes()).hexdigest()
        whole = self.work / "measured" / f"{digest[:24]}.json"
        return whole if share == 1 or whole.exists() else whole.with_suffix(f".{share}.json")

    def _text(self, split: str) -> Path:
        return self.settings.data / "wikitext-2" / f"{split}.txt"

    def _check_work(self) -> None:
        now = {
            "model": state_sha256(self.model.module),
            "units": [unit.name for unit in self.units],
            "formats": [fmt.name for fmt in self.formats],
            "calibration": self.calibration(0).sha256,
            "test": self.test.sha256,
        }
        path = self.work / "settings.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
        for key, value in now.items():
            if before[key] != value:
                raise ValueError(
                    f"{self.work} holds figures of another {key}. Give another --work."
                )
        write_json(path, now)


def ratio(kl: NDArray[np.float64], reference: NDArray[np.float64]) -> tuple[float, float]:
    """Ratio of two mean KLs on the same sequences [N], and its standard error (delta method)."""
    value = float(kl.mean() / reference.mean())
    return value, float(standard_error(kl - value * reference) / reference.mean())


def target(text: str, wanted: str, found: float, stderr: float | None = None) -> Row:
    """A row of the table of targets; ``wanted`` is ``<= 0.6`` or ``>= 1``."""
    sign, limit = wanted.split()
    reached = found <= float(limit) if sign == "<=" else found >= float(limit)
    return {
        "target": text,
        "wanted": wanted,
        "found": found,
        "± stderr": stderr,
        "reached": reached,
    }


def _read_measurement(path: Path) -> Measurement:
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Measurement(np.array(stored["kl"]), None, stored["tokens"])

"""The one place that knows what the files of a run are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FIGURES = ("frontier", "allocation", "sensitivity", "prediction")  # that a report draws
PICTURES = ("png", "svg")  # each of them is there as both


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder: what every file in it is called.

    A folder of packed or exported weights calls those files it has, such as the plan, the same.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def around(cls, target: Path) -> RunFolder:
        """The folder that ``target`` is, or that a file lies in."""
        return cls(target if target.is_dir() else target.parent)

    @property
    def profile(self) -> Path:
        """The sensitivity table."""
        return self.path / "profile.safetensors"

    @property
    def plan(self) -> Path:
        """The plan, the result of the run."""
        return self.path / "plan.json"

    @property
    def frontier(self) -> Path:
        """The plans of all budgets."""
        return self.path / "frontier.json"

    @property
    def confidence(self) -> Path:
        """How sure the plan is of every unit."""
        return self.path / "confidence.json"

    @property
    def measurements(self) -> Path:
        """Every figure measured on held-out data."""
        return self.path / "measurements.json"

    @property
    def measurements_also(self) -> Path:
        """The same on the second held-out text."""
        return self.path / "measurements-also.json"

    @property
    def renderings(self) -> Path:
        """The folder of rounded weights."""
        return self.path / "renderings"

    def tuning(self, key: str) -> Path:
        """How a tuning of scales went; ``key`` is a hash of what it depends on."""
        return self.path / "tuned" / f"{key}.json"

    def tuning_state(self, key: str) -> Path:
        """Where an interrupted tuning goes on."""
        return self.path / "tuned" / f"{key}.state.safetensors"

    def tuned_scales(self, sha256: str) -> Path:
        """The scales of a tuned plan, by their hash."""
        return self.path / "tuned" / f"{sha256[:16]}.safetensors"

    @property
    def rounded(self) -> Path:
        """The folder of weights that were rounded again, block by block."""
        return self.path / "rounded"

    def rounding(self, key: str) -> Path:
        """How sequential rounding went; ``key`` is a hash of what it depends on."""
        return self.rounded / f"{key}.json"

    def rounded_list(self, sha256: str) -> Path:
        """Which weights a plan has that was rounded again, by the hash of this list."""
        return self.rounded / f"{sha256[:16]}.json"

    @property
    def folds(self) -> Path:
        """The folder of scales that were folded into the model."""
        return self.path / "folds"

    def fold(self, sha256: str) -> Path:
        """Folded scales, by their hash."""
        return self.folds / f"{sha256[:16]}.safetensors"

    @property
    def statistics(self) -> Path:
        """The folder of sums over the sequences that weights are rounded by."""
        return self.path / "statistics"

    @property
    def job(self) -> Path:
        """What runs here, how far it is and what it was asked for."""
        return self.path / "job.json"

    @property
    def log(self) -> Path:
        """What happened, one JSON line each."""
        return self.path / "job.log"

    @property
    def lock(self) -> Path:
        """Held by the process that works here."""
        return self.path / "job.lock"

    @property
    def study(self) -> Path:
        """The Optuna study of a search that keeps one, if it was given no other storage."""
        return self.path / "job.sqlite"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / "report.html"

    def figure(self, name: str, kind: str = "png") -> Path:
        """One of FIGURES, as one of PICTURES."""
        return self.path / f"{name}.{kind}"

    def kv(self, key: str) -> Path:
        """Prices of the KV cache; ``key`` is a hash of what they depend on, as below."""
        return self.path / f"kv-{key}.json"

    def oracle(self, key: str) -> Path:
        """Measured KL of the plans that a search or refinement tried, one JSON line each."""
        return self.path / f"oracle-{key}.jsonl"

    def local_prices(self, key: str) -> Path:
        """Prices at a plan's own weights."""
        return self.path / f"local-{key}.safetensors"

    @property
    def reports(self) -> list[Path]:
        """The page and all figures: what tells of a plan, and is stale when there is another."""
        return [self.report, *(self.figure(name, kind) for name in FIGURES for kind in PICTURES)]

    @property
    def shown(self) -> list[Path]:
        """What a browser may be shown."""
        return [*self.reports, self.plan, self.frontier, self.confidence, self.job, self.log]


def plan_path(target: Path) -> Path:
    """The plan that ``target`` is, or that the run or packed folder holds."""
    return RunFolder(target).plan if target.is_dir() else target

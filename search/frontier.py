"""The frontier: every LP-optimal plan from the smallest to the best, in one small file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, NonNegativeInt

from .._base.files import atomic_path
from .._base.records import Record, Strict
from ..sensitivity.provenance import ModelRef
from .hull import lower_hull
from .problem import Problem

SCHEMA = 1


class UniformPoint(NamedTuple):
    """One format everywhere: the format, the plan's bytes and predicted KL (nats per token)."""

    name: str
    bytes: int
    predicted_kl: float


class Points(NamedTuple):
    """The frontier as arrays of K + 1 points, for plotting.

    Attributes:
        bytes: int64 [K + 1], strictly increasing.
        predicted_kl: float64 [K + 1], never increasing, nats per token.  Straight lines between
            the points are the LP lower bound of every plan.
    """

    bytes: NDArray[np.int64]
    predicted_kl: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Frontier:
    """The smallest plan and the K steps from it to the plan with the least predicted KL.

    The plan after any number of steps is optimal for its own bytes, and the piecewise linear
    curve through those plans bounds every plan from below (the LP relaxation of the multiple-
    choice knapsack), so one frontier answers every budget.

    Attributes:
        units: Names of the U units.
        formats: Names of the F formats.
        start: intp [U], format index of every unit in the smallest plan.
        step_unit: intp [K], the unit each step changes.
        step_format: intp [K], the format it changes to.
        bytes: int64 [K + 1], bytes of the smallest plan and after every step.
        predicted_kl: float64 [K + 1], predicted KL increase of the same plans, nats per token.
        weights: Number of weights of all units.
        uniform: The plans with one format everywhere, in the table's order of formats.
        model: The model the prices are for.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    start: NDArray[np.intp]
    step_unit: NDArray[np.intp]
    step_format: NDArray[np.intp]
    bytes: NDArray[np.int64]
    predicted_kl: NDArray[np.float64]
    weights: int
    uniform: tuple[UniformPoint, ...]
    model: ModelRef | None = None

    @classmethod
    def from_problem(cls, problem: Problem, model: ModelRef | None = None) -> Frontier:
        """Compute the whole frontier: hulls, one sort, two cumulative sums."""
        hull = lower_hull(problem)
        smallest = problem.evaluate(hull.start, np.inf)
        best = problem.evaluate(hull.choice(len(hull.unit)), np.inf)
        # Losses are summed from the best plan up: the other way would cancel its small numbers.
        missed = np.append(hull.gain[::-1].cumsum()[::-1], 0.0)
        uniform = []
        for f, name in enumerate(problem.formats):
            choice = problem.uniform_choice(f)
            if choice is not None:
                plan = problem.evaluate(choice, np.inf)
                uniform.append(UniformPoint(name, plan.bytes, plan.loss))
        return cls(
            units=problem.units,
            formats=problem.formats,
            start=hull.start,
            step_unit=hull.unit,
            step_format=hull.format,
            bytes=smallest.bytes + np.append(0, hull.bytes.cumsum()),
            predicted_kl=best.loss + missed,
            weights=problem.weights,
            uniform=tuple(uniform),
            model=model,
        )

    def lower_bound(self, max_bytes: int) -> float:
        """No plan within ``max_bytes`` bytes is predicted below this KL (nats per token).

        Raises:
            ValueError: If not even the smallest plan fits.
        """
        self._check(max_bytes)
        return float(np.interp(max_bytes, self.bytes, self.predicted_kl))

    def at(self, max_bytes: int) -> NDArray[np.intp]:
        """intp [U], format indices of the largest plan of the frontier that fits.

        Raises:
            ValueError: If not even the smallest plan fits.
        """
        self._check(max_bytes)
        steps = int(np.searchsorted(self.bytes, max_bytes, side="right")) - 1
        choice = self.start.copy()
        choice[self.step_unit[:steps]] = self.step_format[:steps]  # numpy keeps the last write
        return choice

    def points(self) -> Points:
        """The plans of the frontier as arrays."""
        return Points(self.bytes, self.predicted_kl)

    def to_json(self) -> str:
        """The frontier as JSON, one step ``[unit, format, bytes, predicted_kl]`` per line."""
        columns = (self.step_unit, self.step_format, self.bytes[1:], self.predicted_kl[1:])
        steps = zip(*(column.tolist() for column in columns), strict=True)
        model = self.model.model_dump() if self.model else None
        start = {
            "choice": self.start.tolist(),
            "bytes": int(self.bytes[0]),
            "predicted_kl": float(self.predicted_kl[0]),
        }
        parts = {
            "schema": str(SCHEMA),
            "model": json.dumps(model, ensure_ascii=False),
            "weights": str(self.weights),
            "units": json.dumps(self.units, ensure_ascii=False),
            "formats": json.dumps(self.formats),
            "uniform": json.dumps([point._asdict() for point in self.uniform]),
            "start": json.dumps(start),
            "steps": "[\n" + ",\n".join(json.dumps(step) for step in steps) + "\n]",
        }
        return "{\n" + ",\n".join(f'"{key}": {value}' for key, value in parts.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Frontier:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not JSON or breaks the schema; the first fault is named.
        """
        return cls._from_file(_File.parse(text, "The text"), "The text")

    @classmethod
    def _from_file(cls, file: _File, where: str) -> Frontier:
        steps = np.array([step[:3] for step in file.steps], dtype=np.int64).reshape(-1, 3)
        losses = [file.start.predicted_kl, *(step[3] for step in file.steps)]
        frontier = cls(
            units=tuple(file.units),
            formats=tuple(file.formats),
            start=np.array(file.start.choice, dtype=np.intp),
            step_unit=steps[:, 0].astype(np.intp),
            step_format=steps[:, 1].astype(np.intp),
            bytes=np.append(file.start.bytes, steps[:, 2]),
            predicted_kl=np.array(losses),
            weights=file.weights,
            uniform=tuple(UniformPoint(p.name, p.bytes, p.predicted_kl) for p in file.uniform),
            model=file.model,
        )
        frontier._check_consistent(where)
        return frontier

    def save(self, path: Path) -> None:
        """Write the frontier as JSON, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Frontier:
        """Read and validate a frontier.

        Raises:
            ValueError: If the file is missing, is not JSON, or breaks the schema.
        """
        return cls._from_file(_File.read(path), str(path))

    def _check(self, max_bytes: int) -> None:
        least = int(self.bytes[0])
        if max_bytes < least:
            bpw = 8 * least / max(self.weights, 1)
            raise ValueError(
                f"Budget of {max_bytes:,} B is {least - max_bytes:,} B below the smallest plan "
                f"of the frontier ({least:,} B, {bpw:.3f} bits per weight). Raise the budget."
            )

    def _check_consistent(self, where: str) -> None:
        """Raise if the numbers of a file cannot be those of a frontier."""
        faults = {
            "start.choice has one format per unit": len(self.start) == len(self.units),
            "step units exist": (self.step_unit < len(self.units)).all(),
            "formats exist": (self.start < len(self.formats)).all()
            and (self.step_format < len(self.formats)).all(),
            "bytes increase": (np.diff(self.bytes) > 0).all(),
            "predicted_kl does not increase": (np.diff(self.predicted_kl) <= 0).all(),
        }
        broken = [rule for rule, holds in faults.items() if not holds]
        if broken:
            raise ValueError(f"{where} is not a valid frontier: it breaks the rule {broken[0]!r}.")


class _Start(Strict):
    choice: list[NonNegativeInt]
    bytes: NonNegativeInt
    predicted_kl: float


class _Uniform(Strict):
    name: str
    bytes: NonNegativeInt
    predicted_kl: float


class _File(Record):
    """The schema of frontier.json."""

    model_config = ConfigDict(allow_inf_nan=False)
    KIND: ClassVar[str] = "frontier"
    MAKE: ClassVar[str] = "`bitplan frontier PROFILE` makes one."

    schema_version: Literal[1] = Field(alias="schema")
    model: ModelRef | None
    weights: NonNegativeInt
    units: list[str]
    formats: list[str]
    uniform: list[_Uniform]
    start: _Start
    steps: list[tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, float]]

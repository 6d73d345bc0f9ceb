"""Two plans of one model side by side: what changed, and what that did to size and quality."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..jobs.folder import RunFolder, plan_path
from ..jobs.measurements import Measurements
from ..quantizers.format import Format
from ..quantizers.runtimes import byte_count
from ..search.plan import Plan, plan_key
from ..sensitivity.table import SensitivityTable

WEIGHTS_FILE = "model.safetensors"  # of a packed folder

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two plans, with what its folder knows besides.

    Attributes:
        name: How it was given.
        plan: The plan.
        shapes: Shapes of modules, as far as the folders say.
        table: Prices; None without a profile.
        kl: float64 [N], measured KL per held-out sequence, nats per token; None if not kept.
        text: Hash of the text those sequences are from.
    """

    name: str
    plan: Plan
    shapes: Shapes
    table: SensitivityTable | None
    kl: NDArray[np.float64] | None
    text: str | None

    @classmethod
    def load(cls, path: Path) -> Side:
        """Read a plan.json, a run folder or a folder of packed weights.

        Raises:
            ValueError: If there is no plan, or a file beside it is damaged.
        """
        file, run = plan_path(path), RunFolder.around(path)
        if path.is_dir() and not file.is_file():
            raise ValueError(
                f"{path} holds no {file.name}. Give a plan.json, a run that is done or a folder "
                "that `bitplan quantize` wrote."
            )
        plan = Plan.load(file)
        table = None
        if run.profile.is_file():
            table = SensitivityTable.load(run.profile)
            if table.provenance.model.sha256 != plan.model.sha256:
                table = None  # another model's profile lies beside this plan
        shapes = _packed_shapes(run.path / WEIGHTS_FILE) if table is None else _shapes(table)
        kl, text = _measurements(run, plan)
        return cls(str(path), plan, shapes, table, kl, text)

    @property
    def size(self) -> int:
        """Bytes that the assignments take: counted where all shapes are known, else as stated."""
        assignments = self.plan.assignments
        if not assignments.keys() <= self.shapes.keys():
            return self.plan.bytes
        return sum(self.bytes_of(module) for module in assignments)

    @property
    def model_bytes(self) -> int | None:
        """Bytes of the whole model's file with these assignments; None if that is not known."""
        whole = self.plan.model_bytes
        return None if whole is None else whole - self.plan.bytes + self.size

    def bytes_of(self, module: str) -> int:
        """Bytes that a module of known shape takes where the plan runs."""
        fmt = Format.parse(self.plan.assignments[module])
        return byte_count(self.plan.runtime)(fmt, self.shapes[module])

    @property
    def weights(self) -> int:
        """Weights that the assignments cover, counted or stated likewise."""
        if not self.plan.assignments.keys() <= self.shapes.keys():
            return self.plan.weights
        return sum(math.prod(self.shapes[m]) for m in self.plan.assignments)


class Change(NamedTuple):
    """A module that the two plans store differently.

    Attributes:
        module: Its name.
        kind: Matrix type, and ``layer`` its layer; None outside the layers or without a profile.
        before: Format in the first plan.
        after: Format in the second.
        bytes: Bytes that the second takes more; None if the shape is unknown.
        kl: Predicted KL that the second costs more, nats per token; None without prices.
    """

    module: str
    kind: str
    layer: int | None
    before: str
    after: str
    bytes: int | None
    kl: float | None

    @property
    def bits(self) -> int:
        """Bits per code that the second plan has more."""
        return Format.parse(self.after).bits - Format.parse(self.before).bits


@dataclass(frozen=True, slots=True)
class PlanDifference:
    """The second plan against the first.

    Attributes:
        first: The first plan.
        second: The second plan.
        changes: The modules stored differently, in the order of the model.
        modules: Modules the two plans have in common.
        paired: Measured KL that the second costs more and its standard error, paired over the
            same held-out sequences; None if not both were measured on them.
    """

    first: Side
    second: Side
    changes: tuple[Change, ...]
    modules: int
    paired: tuple[float, float] | None

    @property
    def same_text(self) -> bool:
        """Whether both were measured on the same tokens of the same text."""
        a, b = self.first.plan.measured, self.second.plan.measured
        if a is None or b is None:
            return False
        return (a.text_sha256, a.tokens, a.length) == (b.text_sha256, b.tokens, b.length)


def compare(first: Path, second: Path) -> PlanDifference:
    """Compare two plans: files, run folders or packed folders.

    Raises:
        ValueError: If a plan cannot be read, or they are for different models or other modules.
    """
    a, b = Side.load(first), Side.load(second)
    hashes = {side.plan.model.sha256 for side in (a, b)} - {""}  # of imports it may be unknown
    if len(hashes) > 1:
        raise ValueError(
            f"{a.name} is a plan for {_model(a.plan)}, {b.name} for {_model(b.plan)}. Only plans "
            "of one model, with the same weights, can be compared."
        )
    shapes = a.shapes | b.shapes
    a, b = replace(a, shapes=shapes), replace(b, shapes=shapes)
    common = [module for module in a.plan.assignments if module in b.plan.assignments]
    if not common:
        raise ValueError(
            f"{a.name} and {b.name} have no module in common: the first assigns "
            f"{next(iter(a.plan.assignments), 'none')!r}, the second "
            f"{next(iter(b.plan.assignments), 'none')!r}. Compare plans of one --include."
        )
    paired = None
    if a.kl is not None and b.kl is not None and a.text == b.text and a.kl.shape == b.kl.shape:
        gap = b.kl - a.kl
        stderr = float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else 0.0
        paired = float(gap.mean()), stderr
    return PlanDifference(a, b, tuple(_changes(a, b, common)), len(common), paired)


def _changes(a: Side, b: Side, modules: Sequence[str]) -> list[Change]:
    prices = _Prices([side.table for side in (a, b) if side.table is not None])
    changes = []
    for module in modules:
        before, after = a.plan.assignments[module], b.plan.assignments[module]
        if before == after:
            continue
        size = None
        if module in a.shapes:
            size = b.bytes_of(module) - a.bytes_of(module)
        kind, layer = prices.place(module)
        kl = prices.difference(module, before, after)
        changes.append(Change(module, kind, layer, before, after, size, kl))
    return changes


class _Prices:
    """Prices of single modules from the profiles at hand, the first one first.

    Modules of a fused unit have no price of their own.
    """

    def __init__(self, tables: Sequence[SensitivityTable]) -> None:
        self._tables = [
            (table, {unit.modules[0]: u for u, unit in enumerate(table.units)}) for table in tables
        ]

    def place(self, module: str) -> tuple[str, int | None]:
        """Kind and layer of a module; its own name without a profile."""
        for table, rows in self._tables:
            if module in rows:
                unit = table.units[rows[module]]
                return unit.kind, unit.layer
        return module, None

    def difference(self, module: str, before: str, after: str) -> float | None:
        """Predicted KL of a module in one format less that in another, from one profile."""
        for table, rows in self._tables:
            u = rows.get(module)
            if u is None or len(table.units[u].modules) > 1:
                continue
            if before in table.formats and after in table.formats:
                old, new = (table.kl[u, table.formats.index(name)] for name in (before, after))
                if np.isfinite(old) and np.isfinite(new):
                    return float(new - old)
        return None


def _shapes(table: SensitivityTable) -> Shapes:
    return {
        module: shape
        for unit in table.units
        for module, shape in zip(unit.modules, unit.shapes, strict=True)
    }


def _packed_shapes(path: Path) -> Shapes:
    """Shapes that a packed checkpoint's header records; empty if it is not one."""
    if not path.is_file():
        return {}
    with suppress(SafetensorError, KeyError, ValueError, TypeError):
        with safe_open(str(path), framework="numpy") as file:
            modules = json.loads((file.metadata() or {})["bitplan"])["modules"]
        return {name: (int(e["shape"][0]), int(e["shape"][1])) for name, e in modules.items()}
    return {}


def _measurements(run: RunFolder, plan: Plan) -> tuple[NDArray[np.float64] | None, str | None]:
    with suppress(OSError, ValueError):
        known = Measurements.read(run.measurements)
        if figures := known.plans.get(plan_key(plan)):
            return np.array(figures.kl, dtype=np.float64), known.text_sha256
    return None, None


def _model(plan: Plan) -> str:
    return f"{plan.model.id} (sha256 {plan.model.sha256[:12]})"

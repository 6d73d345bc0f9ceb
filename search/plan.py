"""A plan: part -> format, with exact bytes, predicted and measured KL, bound and gap."""

from __future__ import annotations

import hashlib
import json
from math import isnan, nan
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from .._base.records import Record, Strict
from ..models.coverage import Coverage
from ..models.units import Ranges, by_matrix, matrix_name, overlap, ranges_fault
from ..quantizers.format import Format
from ..sensitivity.provenance import FoldRef, ModelRef
from . import plan_schema1

SCHEMA = 2
# Left out where there is nothing: earlier versions do not know them.
_LATER = ("evidence", "fold", "measured_also", "nearest_kl", "sequential", "tuning")


# NaN where nothing predicted a plan (one read from another tool's file); null in the file.
Predicted = Annotated[
    float,
    BeforeValidator(lambda value: nan if value is None else value),
    PlainSerializer(lambda value: None if isnan(value) else value, return_type=float | None),
]


class BudgetRef(Strict):
    """What was asked for, as the user wrote it, and the bytes it came to.

    Attributes:
        text: As it was written: ``4.3bpw``, ``2GB of memory``, ``KL <= 0.05``.
        bytes: The most bytes the plan may take; of a ``target``, what the plan found takes.
        kind: What ``text`` states: ``bytes`` to store, a device's ``memory``, or a quality as the
            ``target``, whose bytes are a result.
        memory: Bytes of the device's memory that were asked for, if that was.
    """

    text: str
    bytes: int
    kind: Literal["bytes", "memory", "target"] = "bytes"
    memory: int | None = None

    @property
    def is_target(self) -> bool:
        """Whether a quality was asked for, not a size."""
        return self.kind == "target"


class Measured(Strict):
    """Held-out measurement of a plan: KL in nats per token against the original model."""

    kl: float
    kl_stderr: float
    ppl: float | None = None
    ppl_original: float | None = None
    tokens: int
    length: int | None
    text: str
    text_sha256: str


class MeasuredAlso(Measured):
    """The same on a further held-out text, and on that the best uniform plan that fits.

    The rival is the one that measured best on the first text; nothing of it where none fits.
    ``difference`` is its KL minus the plan's, paired over sequences.
    """

    rival: str | None = None
    rival_kl: float | None = None
    rival_kl_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


class Baseline(Strict):
    """A plan measured on the same tokens, for comparison.

    ``format`` is the one format that every unit has, such as ``int4-g64``, and with KV caches
    ``int4-g64 + kv8``; None for a mixed plan. ``difference`` is its KL minus the shipped plan's,
    paired over sequences; ``ms`` its predicted time where that was asked for. ``tokens`` is how
    many it was measured on where it was so far behind on these that it was not measured on all.
    """

    name: str
    format: str | None = None
    bytes: int
    predicted_kl: float
    kl: float
    kl_stderr: float
    ppl: float | None = None
    difference: float
    difference_stderr: float
    ms: float | None = None
    tokens: int | None = None


class Latency(Strict):
    """Time of the planned matrices, one product after the other.

    Attributes:
        ms: Milliseconds of one step, which gives ``tokens`` tokens.
        tokens: Vectors at a time: the batch.
        device: ``h100:planepack``, or the table of measured times.
        sureness: Which numbers of the device were fitted, and which assumed.
        max_ms: The most milliseconds that were asked for, or those of the fastest plan if that
            was asked for; None if time was no matter.
    """

    ms: float
    tokens: int
    device: str
    sureness: str
    max_ms: float | None = None


class KVCache(Strict):
    """Widths of the key/value cache that share a memory budget with the weights.

    ``bits`` maps layer names to bits; ``bytes`` holds ``context`` tokens x ``batch`` sequences.
    """

    bits: dict[str, int]
    context: int
    batch: int
    bytes: int
    predicted_kl: float


class Refinement(Strict):
    """How far re-linearization went from the solver's first plan.

    KL is measured on calibration sequences that no price comes from, over the original's likeliest
    outcomes (a lower bound on the full KL): to be compared with each other only.
    """

    steps: int
    kl_before: float
    kl_after: float


class SequentialRounding(Strict):
    """What rounding its weights again, each block on the inputs it then has, took a plan to.

    Formats and bytes stay as they are.  KL is measured as for :class:`Refinement`, on calibration
    sequences that no weight was rounded by.

    Attributes:
        matrices: How many matrices were rounded again; the others keep the codes they had.
        kl_before: KL as the plan was rounded first, nats per token.
        kl_after: KL with the weights that ship.
        sha256: Hash of the list of these weights, which are kept in the run folder.
    """

    matrices: int
    kl_before: float
    kl_after: float
    sha256: str


class Tuning(Strict):
    """How far tuning its scales took a plan, whose codes and bytes it leaves as they are.

    KL is measured as for :class:`Refinement`, on calibration sequences that no step was made from.

    Attributes:
        steps: Steps after which the scales were best, which ship.
        tokens: Tokens (positions of the output) that each step looked at.
        kl_before: KL before tuning, nats per token.
        kl_after: KL with the scales that ship.
        sha256: Hash of these scales, which are kept in the run folder.
    """

    steps: int
    tokens: int
    kl_before: float
    kl_after: float
    sha256: str


class RowSet(Strict):
    """Which rows of a matrix a part is: half-open ranges, in the order the part has them."""

    module: str
    rows: list[tuple[int, int]]


class Plan(Record):
    """Part -> format with everything needed to check, reproduce and apply it.

    Attributes:
        assignments: Name of a part -> format name; parts of fused modules appear one by one. A
            part is a whole matrix, called as its module, or a set of its rows: ``name[rows:k]``.
        row_sets: The rows of every part that is no whole matrix.
        goal: What was asked for: the name of a file in ``search/goals``.
        budget: The same in words and bytes.
        bytes: Exact serialized bytes of the assigned weights: in a file for ``runtime``, or without
            one in bitplan's own packed folder.
        weights: Number of weights assigned; ``bpw = 8 * bytes / weights``.
        model_bytes: Bytes of the whole model's file: the assigned weights and everything else,
            header included (an upper bound by a few bytes per tensor); None if that is not known.
        original_bytes: The same of the original model, in the dtype it came in.
        coverage: How much of the model is planned; None if that is not known.
        predicted_kl: Predicted KL increase, nats per token; NaN if nothing predicted it, as for a
            plan read from another tool's file, and so for the next three.
        lower_bound_kl: No plan within the budget can be predicted below this (nats per token).
        gap: ``(predicted_kl - lower_bound_kl) / predicted_kl``.
        resident_bytes: Bytes of the assigned weights as a device holds them, padding included; set
            when a memory was the budget.
        latency: Time of the plan; None if no device or table of times was given.
        runtime: The runtime whose rules the plan keeps and whose bytes it counts; None for none.
        kv_cache: Widths of the KV cache, counted in predicted_kl; None if it was not planned.
        refinement: Set when the plan comes from measured refinement: it may be predicted worse
            than the solver's first plan, and measure better.
        evidence: What the rounding method looked at besides weights, and how sums over data were
            mixed and damped; None, and not in the file, if it looked at nothing.
        fold: Set when scales were folded into the model before it was priced: they are in the run
            folder, and ``model`` is the folded one.
        nearest_kl: By unit, what its format would cost with weights rounded to nearest, in nats
            per token; of the units that a method with an eye on that cost has rounded.
        sequential: Set when the plan's weights were rounded again, block by block: they are in the
            run folder, and both that and the plan are needed to have them.
        tuning: Set when the plan's scales were tuned: they are in the run folder, and both that
            and the plan are needed to have the weights.
        measured_also: Measurements on further held-out texts, of other kinds than the first.
        codes_sha256: Hash of the codes and scales that were measured, where rounding to nearest
            does not give them (``Renderings.digest``).
        note: What the solver had to say.
    """

    KIND: ClassVar[str] = "plan"
    MAKE: ClassVar[str] = "`bitplan search MODEL --budget 4.3bpw` makes one."

    schema_version: Literal[2] = Field(default=2, alias="schema")
    model: ModelRef
    assignments: dict[str, str]
    row_sets: dict[str, RowSet] = Field(default_factory=dict)
    goal: str = "budget"
    budget: BudgetRef
    bytes: int
    weights: int
    bpw: float
    model_bytes: int | None = None
    original_bytes: int | None = None
    coverage: Coverage | None = None
    predicted_kl: Predicted
    predicted_kl_stderr: Predicted
    lower_bound_kl: Predicted
    gap: Predicted
    measured: Measured | None = None
    measured_also: list[MeasuredAlso] = Field(default_factory=list)
    baselines: list[Baseline] = Field(default_factory=list)
    metric: str
    solver: str
    rounding: str
    calibration: dict[str, Any]
    evidence: dict[str, Any] | None = None
    fold: FoldRef | None = None
    versions: dict[str, str]
    resident_bytes: int | None = None
    latency: Latency | None = None
    runtime: str | None = None
    kv_cache: KVCache | None = None
    refinement: Refinement | None = None
    nearest_kl: dict[str, float] = Field(default_factory=dict)
    sequential: SequentialRounding | None = None
    tuning: Tuning | None = None
    codes_sha256: str | None = None
    note: str | None = None
    command: str | None = None
    created: str

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """A plan of schema 1 as one of schema 2; it says nothing of the rest of the model."""
        return plan_schema1.upgraded(data) if data.get("schema") == 1 else data

    @model_serializer(mode="wrap")
    def _without_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = write(self)
        for baseline in data["baselines"]:
            if baseline["tokens"] is None:
                del baseline["tokens"]
        return {name: value for name, value in data.items() if value or name not in _LATER}

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        for name, rows in self.row_sets.items():
            if name not in self.assignments:
                raise ValueError(f"row_sets.{name}: it has no format in assignments")
            if rows.module != matrix_name(name) or rows.module == name:
                raise ValueError(f"row_sets.{name}: a part of {rows.module!r} has another name")
            if fault := ranges_fault(tuple(rows.rows)):
                raise ValueError(f"row_sets.{name}: {fault}")
        for name in self.assignments:
            if matrix_name(name) != name and name not in self.row_sets:
                raise ValueError(f"assignments.{name}: row_sets does not say which rows these are")
        for matrix, parts in by_matrix(self.row_ranges).items():
            if matrix in self.assignments:
                raise ValueError(f"assignments.{matrix}: its rows have formats of their own")
            if shared := overlap(parts.values()):
                raise ValueError(
                    f"row_sets: parts of {matrix} share rows {shared[0]} to {shared[1] - 1}"
                )
        return self

    @property
    def row_ranges(self) -> dict[str, Ranges]:
        """:attr:`row_sets` as ranges by the name of the part."""
        return {name: tuple(rows.rows) for name, rows in self.row_sets.items()}

    @property
    def total_bytes(self) -> int:
        """Bytes that the budget limits: of the weights and, if planned, of the KV cache.

        Weights count as they are held where a memory is the budget, else as they are stored.
        """
        weights = self.bytes if self.resident_bytes is None else self.resident_bytes
        return weights + (self.kv_cache.bytes if self.kv_cache else 0)

    def original(self) -> str:
        """The original model's name, to load it.

        Raises:
            ValueError: If the plan was imported without one.
        """
        if not self.model.sha256:
            raise ValueError(
                f"The plan was {self.note or 'imported'} without the original model, so there is "
                "nothing to apply it to. Import it again with --model MODEL."
            )
        return self.model.id

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically, keys in declaration order."""
        self.write(path)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read and validate a plan of this schema or an earlier one.

        Raises:
            ValueError: If the file is missing, is not JSON, breaks the schema, or assigns what is
                no format.
        """
        plan = cls.read(path)
        first_use = {fmt: part for part, fmt in reversed(plan.assignments.items())}
        for fmt, part in first_use.items():
            try:
                Format.parse(fmt)
            except ValueError as error:
                raise ValueError(
                    f"{path} is not a valid plan: {part!r} has the format {fmt!r}. {error}"
                ) from error
        return plan


def plan_key(plan: Plan) -> str:
    """What decides a plan's measurement, as a hash: its key in ``measurements.json``."""
    parts: list[Any] = [plan.model.sha256, plan.rounding, sorted(plan.assignments.items())]
    if plan.row_sets:
        parts.append({name: rows.model_dump() for name, rows in sorted(plan.row_sets.items())})
    if plan.kv_cache:
        parts.append(list(plan.kv_cache.bits.items()))
    if plan.sequential:
        parts.append({"sequential": plan.sequential.sha256})
    if plan.tuning:
        parts.append(plan.tuning.sha256)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

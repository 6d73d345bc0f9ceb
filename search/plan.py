"""A plan: unit -> format, with exact bytes, predicted and measured KL, bound and gap."""

from __future__ import annotations

import hashlib
import json
from math import isnan, nan
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from .._base.files import read_json_text, write_json
from ..quantizers.format import Format

SCHEMA = 1
PLAN_FILE = "plan.json"  # its name in a run folder
MEASUREMENTS_FILE = "measurements.json"  # every figure measured in a run folder


# NaN where nothing predicted a plan (one read from another tool's file); null in the file.
Predicted = Annotated[
    float,
    BeforeValidator(lambda value: nan if value is None else value),
    PlainSerializer(lambda value: None if isnan(value) else value, return_type=float | None),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelRef(_Strict):
    """Which model a plan is for."""

    id: str
    revision: str | None = None
    sha256: str


class BudgetRef(_Strict):
    """The budget as the user wrote it and the bytes it meant."""

    text: str
    bytes: int


class Measured(_Strict):
    """Held-out measurement of a plan: KL in nats per token against the original model."""

    kl: float
    kl_stderr: float
    ppl: float | None = None
    ppl_original: float | None = None
    tokens: int
    length: int | None
    text: str
    text_sha256: str


class Baseline(_Strict):
    """A plan measured on the same tokens, for comparison.

    ``difference`` is its KL minus the shipped plan's, paired over sequences; ``ms`` its predicted
    time where that was asked for.
    """

    name: str
    bytes: int
    predicted_kl: float
    kl: float
    kl_stderr: float
    ppl: float | None = None
    difference: float
    difference_stderr: float
    ms: float | None = None


class Latency(_Strict):
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


class KVCache(_Strict):
    """Widths of the key/value cache that share a memory budget with the weights.

    ``bits`` maps layer names to bits; ``bytes`` holds ``context`` tokens x ``batch`` sequences.
    """

    bits: dict[str, int]
    context: int
    batch: int
    bytes: int
    predicted_kl: float


class Refinement(_Strict):
    """How far re-linearization went from the solver's first plan.

    KL is measured on calibration sequences that no price comes from, over the original's likeliest
    outcomes (a lower bound on the full KL): to be compared with each other only.
    """

    steps: int
    kl_before: float
    kl_after: float


class Plan(_Strict):
    """Unit -> format with everything needed to check, reproduce and apply it.

    Attributes:
        assignments: Canonical module name -> format name; fused modules appear one by one.
        bytes: Exact serialized bytes of the assigned weights: in a file for ``runtime``, or without
            one in bitplan's own packed folder.
        weights: Number of weights assigned; ``bpw = 8 * bytes / weights``.
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
        codes_sha256: Hash of the codes that were measured, where rounding to nearest does not give
            them (``Renderings.digest``).
        note: What the solver had to say.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: ModelRef
    assignments: dict[str, str]
    budget: BudgetRef
    bytes: int
    weights: int
    bpw: float
    predicted_kl: Predicted
    predicted_kl_stderr: Predicted
    lower_bound_kl: Predicted
    gap: Predicted
    measured: Measured | None = None
    baselines: list[Baseline] = []
    metric: str
    solver: str
    rounding: str
    calibration: dict[str, Any]
    versions: dict[str, str]
    resident_bytes: int | None = None
    latency: Latency | None = None
    runtime: str | None = None
    kv_cache: KVCache | None = None
    refinement: Refinement | None = None
    codes_sha256: str | None = None
    note: str | None = None
    command: str | None = None
    created: str

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

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
        content = self.model_dump(by_alias=True)
        if self.codes_sha256 is None:
            del content["codes_sha256"]  # earlier versions read plans that have none
        write_json(path, content)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read and validate a plan.

        Raises:
            ValueError: If the file is missing, is not JSON, breaks the schema, or assigns what is
                no format.
        """
        if not path.is_file():
            raise ValueError(
                f"No plan at {path}. `bitplan search MODEL --budget 4.3bpw` makes one."
            )
        try:
            plan = cls.model_validate_json(read_json_text(path, "plan"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ValueError(f"{path} is not a valid plan: {where}: {first['msg']}.") from error
        first_use = {name: module for module, name in reversed(plan.assignments.items())}
        for name, module in first_use.items():
            try:
                Format.parse(name)
            except ValueError as error:
                raise ValueError(
                    f"{path} is not a valid plan: {module!r} has the format {name!r}. {error}"
                ) from error
        return plan


def plan_key(plan: Plan) -> str:
    """What decides a plan's measurement, as a hash: its key in ``measurements.json``."""
    parts: list[Any] = [plan.model.sha256, plan.rounding, sorted(plan.assignments.items())]
    if plan.kv_cache:
        parts.append(list(plan.kv_cache.bits.items()))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

"""What a sensitivity table was made from, as data: model, text, metric, rounding, versions."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..models.wording import Words, words_of

_NEEDED = ("model", "metric", "rounding", "calibration")  # what a plan must state


class ModelRef(BaseModel):
    """Which model a table or a plan is for.

    Attributes:
        id: Its name, such as a Hugging Face id.
        revision: The commit it was taken from, if it has any.
        sha256: Hash of its weights; empty where the model is not known.
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    revision: str | None = None
    sha256: str


class FoldRef(BaseModel):
    """Scales that were moved between a model's matrices and what feeds them before all else.

    Attributes:
        method: How the scales were chosen: ``awq`` or ``sinq``.
        count: Norms and linear layers that they were folded into.
        sha256: Hash of the scales, which are kept in the run folder.
        model_sha256: Hash of the weights before; that of the weights after is the model's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    count: int
    sha256: str
    model_sha256: str


class Provenance(BaseModel):
    """What produced a table; equal provenance of two runs means equal tables.

    Everything may be unknown, as for a table that was not measured: an empty text, an empty
    mapping or None then stands for it.

    Attributes:
        model: The model.
        definition_sha256: Hash of the Python file that defines the model; None for one that a
            library defines.
        dtype: The checkpoint's own dtype, which ``keep`` means: ``bfloat16``.
        metric: Name of the sensitivity metric.
        rounding: Name of the rounding method whose errors are priced.
        calibration: What the samples say of themselves: source, number, length, seed, hash.
        seed: Seed of every random draw.
        outside_bytes: Bytes of a written model file that are not units, header included.
        file_bytes: Bytes of the file that the model came in, where ``dtype`` does not give them.
        layer_types: Unit -> what it is where it is no product of a matrix with every input:
            ``embedding``, ``tied embedding``, ``convolution``.
        coverage: Which of the model's weights are in units, and which are left out and why.
        evidence: What the rounding method looked at besides weights, and what it was made from.
        fold: Which scales were folded into the model that was priced; None for none.
        versions: Library -> version.

    >>> Provenance(metric="fisher", seed=0).to_json()
    {'metric': 'fisher', 'seed': 0}
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelRef = ModelRef(id="", sha256="")
    definition_sha256: str | None = None
    dtype: str | None = None
    metric: str = ""
    rounding: str = ""
    calibration: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    outside_bytes: int | None = None
    file_bytes: int | None = None
    layer_types: dict[str, str] = Field(default_factory=dict)
    coverage: dict[str, Any] | None = None
    evidence: dict[str, Any] | None = None
    fold: FoldRef | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Any) -> Provenance:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If something is of another type, or has a name that is not here.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(("provenance", *(str(part) for part in first["loc"])))
            raise ValueError(f"{where}: {first['msg']}") from error

    @property
    def words(self) -> Words:
        """What a KL is a mean over, in words."""
        return words_of(self.calibration)

    def to_json(self) -> dict[str, Any]:
        """All that is known, as JSON in the order of the fields."""
        return {key: value for key, value in self.model_dump().items() if self._knows(key)}

    def require_complete(self) -> None:
        """Raise unless everything is known that a plan must state.

        Raises:
            ValueError: Names what is not.
        """
        missing = [name for name in _NEEDED if not self._knows(name)]
        if missing:
            raise ValueError(
                f"The sensitivity table does not record its {', '.join(missing)}, which a plan "
                "must state. Profile again, or fill in SensitivityTable.provenance."
            )

    def decisive(self) -> dict[str, Any]:
        """What prices depend on, by dotted name: without versions and what follows from others."""
        flat: dict[str, Any] = {}
        for key, value in self.model_dump().items():
            inner = value if isinstance(value, dict) else {"": value}
            flat |= {f"{key}.{name}".rstrip("."): entry for name, entry in inner.items()}
        silent = (
            "versions",
            "layer_types",
            "coverage",
            "file_bytes",
            "outside_bytes",
            "model.id",
            "calibration.per",
        )
        return {key: value for key, value in flat.items() if not key.startswith(silent)}

    def _knows(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Provenance(), name))

"""Every figure measured on held-out data, as a run folder keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from .._base.records import Record, Strict


class Figures(Strict):
    """What one plan did on every sequence: nats per token, ``nll`` None without text."""

    kl: list[float]
    nll: list[float] | None
    tokens: int


class Measurements(Record):
    """The figures of one held-out text.

    Attributes:
        text_sha256: Hash of its sequences.
        codes: Hash of what rounded the weights of the plans, where codes are kept.
        ppl_original: Perplexity of the original; None before a measurement or without text.
        plans: What decides a plan's figures, as :func:`..search.plan.plan_key` -> its figures.
    """

    KIND: ClassVar[str] = "file of measurements"

    schema_version: Literal[1] = Field(default=1, alias="schema")
    text_sha256: str
    codes: str = ""
    ppl_original: float | None = None
    plans: dict[str, Figures] = Field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, text_sha256: str, codes: str = "") -> Measurements:
        """Those that are there of this text and these codes; none if the file is missing or bad."""
        try:
            known = cls.read(path)
        except (ValueError, OSError):
            known = None
        if known is None or (known.text_sha256, known.codes) != (text_sha256, codes):
            return cls(text_sha256=text_sha256, codes=codes)  # everything is measured again
        return known

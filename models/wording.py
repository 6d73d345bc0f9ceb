"""What a KL divergence is a mean over, in the words of whoever brought the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Words(NamedTuple):
    """The words of one kind of model.

    Attributes:
        one: What a KL is a mean over.
        many: The same, several of them.
        drawn: What calibration and validation take whole, and errors are estimated over.
    """

    one: str
    many: str
    drawn: str

    @property
    def nats(self) -> str:
        """The unit of a KL divergence."""
        return f"nats per {self.one}"


TEXT = Words("token", "tokens", "sequences")
_WORDS = {
    "sample": Words("sample", "samples", "samples"),  # one prediction for each, as for an image
    "position": Words("position", "positions", "samples"),  # several, as for every pixel
}


def words_of(calibration: Mapping[str, Any]) -> Words:
    """The words for a model, from what a profile or a plan records of its calibration.

    >>> words_of({"source": "builtin", "length": 128}).nats
    'nats per token'
    >>> words_of({"source": "workload", "length": None, "per": "sample"}).nats
    'nats per sample'
    """
    return _WORDS.get(calibration.get("per", ""), TEXT)

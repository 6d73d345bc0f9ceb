"""What part of a model's weights a plan is about, as data without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ENOUGH = 0.9  # below this share, bits per weight of the units say little about the model
IDLE = "no part in the output on the calibration data"  # why a weight is in no unit
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Left:
    """A weight that is in no unit.

    Attributes:
        name: Its name.
        weights: How many entries it has.
        reason: Why it is in none.
    """

    name: str
    weights: int
    reason: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """The weights of a model: entries of parameters with two or more dimensions, tied ones once.

    Attributes:
        planned: Weights in units.
        weights: All weights.
        left_out: Those in no unit.
        selected: Whether the user chose the units with ``--include`` or ``--exclude``.
        unreached: Experts that no calibration token reached, whose price is their type's.
        carried: Tensors of the checkpoint that the architecture does not have; not counted above.
    """

    planned: int
    weights: int
    left_out: tuple[Left, ...] = ()
    selected: bool = False
    unreached: tuple[str, ...] = ()
    carried: tuple[Left, ...] = ()

    @property
    def share(self) -> float:
        """Weights in units over weights of the model: 1 if nothing is left out."""
        return self.planned / self.weights if self.weights else 1.0

    @property
    def share_of_used(self) -> float:
        """Weights in units over those that the output depends on."""
        idle = sum(left.weights for left in self.left_out if left.reason == IDLE)
        used = self.weights - idle
        return self.planned / used if used else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for a profile's provenance and a plan."""
        plain = asdict(self) | {
            "left_out": [asdict(left) for left in self.left_out],
            "unreached": list(self.unreached),
            "carried": [asdict(left) for left in self.carried],
        }
        if not self.carried:
            del plain["carried"]
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Coverage:
        """Invert :meth:`to_json`."""
        return cls(
            int(data["planned"]),
            int(data["weights"]),
            tuple(Left(**left) for left in data.get("left_out", ())),
            bool(data.get("selected", False)),
            tuple(data.get("unreached", ())),
            tuple(Left(**left) for left in data.get("carried", ())),
        )

    def require(self, budget: str) -> None:
        """Refuse a budget per weight that is about too small a part of the model.

        Args:
            budget: The budget as the user wrote it, for the message.

        Raises:
            ValueError: If units cover less than 90 % of the weights and nobody asked for that.
        """
        if self.share_of_used >= ENOUGH or self.selected:
            return
        largest = sorted(self.left_out, key=lambda left: -left.weights)[:_NAMED]
        named = ", ".join(f"{x.name} ({x.weights:,} weights, {x.reason})" for x in largest)
        raise ValueError(
            f"{budget} would hold for {self.share:.0%} of the model's weights only. Left out are "
            f"{len(self.left_out)} parameters, the largest {named}. Give the budget in bytes, or "
            "say what is meant with --include or --exclude."
        )

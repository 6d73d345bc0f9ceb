"""The multiple-choice knapsack: pick one format per unit, least loss within a byte budget."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from ..quantizers.format import resolve_formats
from ..sensitivity.table import SensitivityTable, UnitInfo
from .budget import format_bytes

NO_BYTES = np.iinfo(np.int64).max  # larger than any option: stands in for "not allowed"


@dataclass(frozen=True, slots=True)
class Solution:
    """One format per unit, and a bound no other choice can beat.

    Attributes:
        choice: intp [U], index of the format of every unit.
        loss: Predicted KL increase of the choice, nats per token.
        bytes: Exact stored bytes of the choice.
        lower_bound: No choice within the budget has a smaller loss (nats per token); equal to
            ``loss`` when the choice is proven optimal.
    """

    choice: NDArray[np.intp]
    loss: float
    bytes: int
    lower_bound: float

    @property
    def gap(self) -> float:
        """Relative optimality gap ``(loss - lower_bound) / loss``; 0 means proven optimal."""
        excess = self.loss - self.lower_bound
        return excess / max(abs(self.loss), abs(self.lower_bound)) if excess > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """U units times F formats: the arrays every solver sees.

    Attributes:
        units: Names of the U units.
        formats: Names of the F formats.
        bytes: int64 [U, F], exact stored bytes.
        loss: float64 [U, F], predicted KL increase in nats per token; ``inf`` where the unit
            must not take the format.  Negative losses are allowed: re-linearized prices are
            changes from the current plan.
        weights: Number of weights of all units, for bits per weight; 0 if there is no such
            number.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]
    weights: int = 0

    def __post_init__(self) -> None:
        """Check shapes and values, so that no solver has to.

        Raises:
            ValueError: If a shape is wrong, a loss is NaN or -inf, a byte count is negative, or
                a unit is left without any format.
        """
        shape = (len(self.units), len(self.formats))
        if self.bytes.shape != shape or self.loss.shape != shape or 0 in shape:
            raise ValueError(
                f"Expected bytes and loss of shape {shape} with at least one unit and format, "
                f"got {self.bytes.shape} and {self.loss.shape}."
            )
        bad = np.isnan(self.loss) | (self.loss == -np.inf) | (self.bytes < 0)
        if bad.any():
            u, f = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"Unit {self.units[u]!r} in {self.formats[f]!r} costs {self.loss[u, f]} nats and "
                f"{self.bytes[u, f]} B. A loss must be a number, or inf where the format is not "
                "allowed, and bytes cannot be negative."
            )
        closed = ~self.allowed.any(axis=1)
        if closed.any():
            raise ValueError(
                f"Unit {self.units[int(closed.argmax())]!r} has no allowed format: none of those "
                "left by --formats and --pin was measured for it. Allow another one."
            )

    @classmethod
    def from_table(
        cls,
        table: SensitivityTable,
        pins: Mapping[str, str] | None = None,
        formats: Sequence[str] | None = None,
    ) -> Problem:
        """Turn a sensitivity table into arrays; format indices stay those of the table.

        NaN prices (not measured) become ``inf`` (not allowed).  The format ``keep`` stands for the
        checkpoint's own dtype, which the table's provenance records.

        Args:
            table: The sensitivity table.
            pins: Glob on unit, module or alias names -> the only format they may take.  A later
                pin overrides an earlier one; a pin on one module of a fused unit pins the unit.
            formats: The formats that units without a pin may take; all by default.

        Raises:
            ValueError: If a pin matches nothing, or a format is not in the table.
        """
        allowed = np.zeros(table.kl.shape, dtype=bool)
        for name in table.formats if formats is None else formats:
            allowed[:, _format_index(table, name)] = True
        for pattern, name in (pins or {}).items():
            matched = [_matches(unit, pattern) for unit in table.units]
            if not any(matched):
                raise ValueError(
                    f"The pin {pattern!r} matches no unit or module."
                    f"{_nearest(pattern, [n for unit in table.units for n in _names(unit)])}"
                )
            allowed[matched] = False
            allowed[matched, _format_index(table, name)] = True
        return cls(
            units=tuple(unit.name for unit in table.units),
            formats=table.formats,
            bytes=table.bytes,
            loss=np.where(allowed & ~np.isnan(table.kl), table.kl, np.inf),
            weights=table.weights,
        )

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """bool [U, F], whether a unit may take a format."""
        return self.loss < np.inf

    def evaluate(self, choice: NDArray[np.intp], lower_bound: float) -> Solution:
        """The Solution of a choice [U], with its exact bytes and its loss.

        A bound above the loss can only be rounding and is lowered to the loss.
        """
        rows = np.arange(len(self.units))
        loss = float(self.loss[rows, choice].sum())
        size = int(self.bytes[rows, choice].sum())
        return Solution(choice, loss, size, min(lower_bound, loss))

    def smallest_bytes(self) -> NDArray[np.int64]:
        """int64 [U], bytes of every unit in its smallest allowed format."""
        smallest: NDArray[np.int64] = np.where(self.allowed, self.bytes, NO_BYTES).min(axis=1)
        return smallest

    def best_choice(self) -> NDArray[np.intp]:
        """intp [U], the least loss without any budget; of equals the smallest, then the first."""
        lowest = self.loss == self.loss.min(axis=1, keepdims=True)
        choice: NDArray[np.intp] = np.where(lowest, self.bytes, NO_BYTES).argmin(axis=1)
        return choice

    def uniform_choice(self, format_index: int) -> NDArray[np.intp] | None:
        """intp [U], the same format everywhere; None if some unit cannot take it.

        Units that may take only one format (pinned) keep that one.  None, too, if all are pinned
        and not all to this format: no unit is left to take it.
        """
        allowed = self.allowed
        pinned = allowed.sum(axis=1) == 1
        if not (pinned | allowed[:, format_index]).all():
            return None
        if pinned.all() and not allowed[:, format_index].all():
            return None
        return np.where(pinned, allowed.argmax(axis=1), format_index)

    def check_feasible(self, max_bytes: int) -> None:
        """Raise if even the smallest plan does not fit.

        Raises:
            ValueError: With the missing bytes, the smallest plan and its largest unit.
        """
        smallest = self.smallest_bytes()
        least = int(smallest.sum())
        if max_bytes >= least:
            return
        largest = int(smallest.argmax())
        raise ValueError(
            f"Budget of {max_bytes:,} B is {least - max_bytes:,} B below the smallest possible "
            f"plan ({self.describe_bytes(least)}). The largest unit there is "
            f"{self.units[largest]!r} ({format_bytes(int(smallest[largest]))}). "
            "Raise the budget or allow a format with fewer bits."
        )

    def describe_bytes(self, count: int) -> str:
        """``120,000 B, 3.200 bits per weight``; without the second part if weights are unknown."""
        bpw = f", {8 * count / self.weights:.3f} bits per weight" if self.weights else ""
        return f"{count:,} B{bpw}"


def _names(unit: UnitInfo) -> tuple[str, ...]:
    return (unit.name, *unit.modules, *unit.aliases)


def _matches(unit: UnitInfo, pattern: str) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in _names(unit))


def _format_index(table: SensitivityTable, name: str) -> int:
    if name == "keep":
        name = _kept_format(table)
    if name not in table.formats:
        raise ValueError(
            f"Format {name!r} is not in the profile.{_nearest(name, table.formats)} "
            f"It has {', '.join(table.formats)}."
        )
    return table.formats.index(name)


def _kept_format(table: SensitivityTable) -> str:
    """The format of the checkpoint's own dtype, which must be among the table's."""
    dtype = table.provenance.get("dtype")
    if dtype is None:
        raise ValueError(
            "'keep' means the checkpoint's own dtype, which this profile does not record. Name "
            f"one of its formats ({', '.join(table.formats)}), or profile again with 'keep' among "
            "--formats."
        )
    kept = resolve_formats(["keep"], dtype)[0].name
    if kept not in table.formats:
        raise ValueError(
            f"'keep' means {kept!r} for this model, which is not in the profile (it has "
            f"{', '.join(table.formats)}). Profile again with {kept!r} added to --formats."
        )
    return kept


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3, cutoff=0.3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""

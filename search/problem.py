"""The multiple-choice knapsack: pick one format per unit, least loss within a byte budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..sensitivity.table import SensitivityTable
from .budget import format_bytes
from .matching import format_index, unit_names
from .oracle import Oracle

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
        note: What the solver has to say about this answer, in a sentence or two; often nothing.
    """

    choice: NDArray[np.intp]
    loss: float
    bytes: int
    lower_bound: float
    note: str = ""

    @property
    def gap(self) -> float:
        """Relative optimality gap ``(loss - lower_bound) / loss``; 0 means proven optimal."""
        excess = self.loss - self.lower_bound
        return excess / max(abs(self.loss), abs(self.lower_bound)) if excess > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Constraint:
    """One more linear limit besides the bytes: ``sum_u cost[u, choice[u]] <= limit``.

    Attributes:
        name: What is limited, such as ``latency``.
        cost: float64 [U, F], what every unit adds in every format.
        limit: The most the sum may be.
        symbol: Unit of cost and limit, such as ``ms``.
        option: Option that sets the limit, in that unit, such as ``--max-ms``; empty for none.
    """

    name: str
    cost: NDArray[np.float64]
    limit: float
    symbol: str = ""
    option: str = ""


@dataclass(frozen=True, slots=True)
class Caches:
    """KV caches among the rows of a problem: its last L rows and last B columns.

    Attributes:
        layers: Names of the L layers.
        bits: The B widths.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]


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
        unit_weights: int64 [U], weights of every unit; None if there are no such numbers.
        kinds: Matrix type of every unit (``mlp.up_proj``); empty if unknown.
        layers: Layer of every unit, None outside the repeated stack; empty if unknown.
        scores: float32 [N, U, F], per-sequence scores with ``loss`` near ``mean(scores**2)``, in
            sqrt(nats per token); None if the metric gives none.
        constraints: Further limits besides the bytes.
        max_loss: Quality target in nats per token, for solvers that minimize bytes.
        oracle: Measures the true KL of a choice, for solvers that search on it; without one they
            search on ``loss``.
        bytes_option: Option that sets the budget of just these bytes; empty for none.
        floor: Why the smallest plan is not smaller and what to do, if a rule is the reason.
        caches: The KV caches that share the bytes with the weights; None if there are none.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]
    weights: int = 0
    unit_weights: NDArray[np.int64] | None = None
    kinds: tuple[str, ...] = ()
    layers: tuple[int | None, ...] = ()
    scores: NDArray[np.float32] | None = None
    constraints: tuple[Constraint, ...] = ()
    max_loss: float = np.inf
    oracle: Oracle | None = None
    bytes_option: str = "--budget"
    floor: str = ""
    caches: Caches | None = None

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
            pins: Glob on unit, module or alias names or kinds -> the only format they may take.
                A later pin overrides an earlier one; a pin on one module of a fused unit pins
                the unit.
            formats: The formats that units without a pin may take; all by default.

        Raises:
            ValueError: If a pin matches nothing, or a format is not in the table.
        """
        allowed = np.zeros(table.kl.shape, dtype=bool)
        for name in table.formats if formats is None else formats:
            allowed[:, format_index(table, name)] = True
        names = unit_names(table.units if pins else ())
        for pattern, name in (pins or {}).items():
            pinned = names.find(pattern, "--pin")
            allowed[pinned] = False
            allowed[pinned, format_index(table, name)] = True
        return cls(
            units=tuple(unit.name for unit in table.units),
            formats=table.formats,
            bytes=table.bytes,
            loss=np.where(allowed & ~np.isnan(table.kl), table.kl, np.inf),
            weights=table.weights,
            unit_weights=np.array([unit.weights for unit in table.units], dtype=np.int64),
            kinds=tuple(unit.kind for unit in table.units),
            layers=tuple(unit.layer for unit in table.units),
            scores=table.scores,
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
            + (self.floor or "Raise the budget or allow a format with fewer bits.")
        )

    def require_bytes_only(self, solver: str) -> None:
        """Raise if there are limits besides the bytes, for a solver that would overlook them.

        Raises:
            ValueError: Naming the constraints and a solver that obeys them.
        """
        if self.constraints:
            names = ", ".join(constraint.name for constraint in self.constraints)
            raise ValueError(
                f"The {solver!r} solver limits bytes only and cannot obey the constraints given "
                f"besides ({names}). Use a solver that takes limits, such as 'certified', or drop "
                "them."
            )

    def describe_bytes(self, count: int) -> str:
        """``120,000 B, 3.200 bits per weight``; without the second part if weights are unknown."""
        bpw = f", {8 * count / self.weights:.3f} bits per weight" if self.weights else ""
        return f"{count:,} B{bpw}"

"""The problem with all its limits as a one-hot 0/1 program, minimized by HiGHS."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .problem import Constraint, Problem

TOLERANCE = 1e-6  # by how much HiGHS may exceed a row, in absolute numbers
LARGEST = 1e3  # coefficient of a scaled row
OPTIMUM = 1e4  # scaled objective; HiGHS's other tolerances are absolute as well
ROUNDING = 1e-9  # relative; sums of float costs are compared with their limit to within this
MAX_SECONDS = 60.0
MAX_ROUNDS = 10  # of tightening limits that an answer exceeds


def all_limits(problem: Problem, max_bytes: int) -> tuple[Constraint, ...]:
    """The bytes and the further constraints, as linear limits of one kind."""
    return (
        Constraint("bytes", problem.bytes.astype(np.float64), max_bytes, "B", problem.bytes_option),
        *problem.constraints,
    )


def usable(problem: Problem) -> NDArray[np.bool_]:
    """bool [U, F], options that are allowed and have a finite cost in every constraint.

    Raises:
        ValueError: If a cost has another shape than the problem, or a unit is left without any
            option.
    """
    result = problem.allowed
    for constraint in problem.constraints:
        if constraint.cost.shape != result.shape:
            raise ValueError(
                f"The cost of the constraint {constraint.name!r} has shape "
                f"{constraint.cost.shape}, expected {result.shape}: units times formats."
            )
        result = result & np.isfinite(constraint.cost)
        if not result.any(axis=1).all():
            unit = problem.units[int(result.any(axis=1).argmin())]
            raise ValueError(
                f"Unit {unit!r} has no allowed format with a finite cost in {constraint.name!r}. "
                "Allow another format for it or complete the costs."
            )
    return result


def used(limit: Constraint, choice: NDArray[np.intp]) -> float:
    """What a choice [U] adds up to; exact for bytes, which stay below 2^53."""
    return float(limit.cost[np.arange(len(choice)), choice].sum())


def excess(limit: Constraint, choice: NDArray[np.intp]) -> float:
    """By how much a choice [U] is above the limit; 0 within it.

    Limits that are integers, as the bytes, count exactly, others to a part in a billion.
    """
    over = used(limit, choice) - limit.limit
    tolerance = 0.0 if isinstance(limit.limit, int) else ROUNDING * abs(limit.limit)
    return over if over > tolerance else 0.0


def scaled_row(
    limit: Constraint, options: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], float, float]:
    """A limit counted from every unit's least, in units that make its largest entry LARGEST.

    Args:
        limit: The limit.
        options: bool [U, F], the options that count.

    Returns:
        Coefficients [U, F], 0 outside ``options``; the room above the least; and the scale: one
        scaled unit in units of the limit.
    """
    least = np.where(options, limit.cost, np.inf).min(axis=1)
    above = np.where(options, limit.cost - least[:, None], 0.0)
    scale = float(above.max()) / LARGEST or 1.0
    return above / scale, (limit.limit - float(least.sum())) / scale, scale


class Answer(NamedTuple):
    """What HiGHS found.

    Attributes:
        choice: intp [U].
        bound: No choice within the limits has a smaller objective; without ``whole``, the
            objective of the LP relaxation.
    """

    choice: NDArray[np.intp]
    bound: float


@dataclass(frozen=True, slots=True)
class Program:
    """One 0/1 variable per usable option, exactly one of each unit's, and R limits.

    Attributes:
        problem: The problem.
        limits: The R limits, the bytes first.
        options: bool [U, F], the usable options; K are true.
        rows: float64 [R, K], scaled cost of every variable.
        room: float64 [R], scaled right-hand sides.
        scale: float64 [R], one scaled unit in units of the limit.
    """

    problem: Problem
    limits: tuple[Constraint, ...]
    options: NDArray[np.bool_]
    rows: NDArray[np.float64]
    room: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def build(cls, problem: Problem, max_bytes: int) -> Program:
        """Scale the limits of ``problem`` and of the bytes.

        Raises:
            ValueError: If a constraint does not fit the problem (``usable``).
        """
        limits, options = all_limits(problem, max_bytes), usable(problem)
        rows, room, scale = zip(*(scaled_row(limit, options) for limit in limits), strict=True)
        stacked = np.stack([row[options] for row in rows])
        return cls(problem, limits, options, stacked, np.array(room), np.array(scale))

    def minimize(
        self,
        objective: NDArray[np.float64],
        *,
        keep: Sequence[int] | None = None,
        max_gap: float = 0.0,
        whole: bool = True,
        typical: float | None = None,
    ) -> Answer | None:
        """The choice with the least sum of ``objective`` within the limits.

        HiGHS obeys limits to within a tolerance.  So every answer is counted again, and while one
        exceeds a limit that limit is tightened by a little more; the bound stays that of the first
        run.

        Args:
            objective: float64 [U, F].
            keep: Indices of the limits to obey; all by default.
            max_gap: Relative gap between the choice and the bound at which to stop.
            whole: False solves the LP relaxation; the choice is then its largest fractions.
            typical: Expected sum of the objective above every unit's least, to scale it by; by
                default its largest entry.

        Returns:
            The answer, or None if no choice is within the limits.

        Raises:
            ValueError: If HiGHS stops, after MAX_SECONDS, without any choice, or keeps exceeding
                a limit.
        """
        keep = list(range(len(self.limits)) if keep is None else keep)
        least = np.where(self.options, objective, np.inf).min(axis=1)
        cost = (objective - least[:, None])[self.options]
        scale = OPTIMUM / (typical or float(cost.max()) or 1.0)
        room, bound = self.room[keep], None
        for attempt in range(MAX_ROUNDS):
            found = self._run(cost * scale, self.rows[keep], room, whole, max_gap)
            if found is None:
                return None
            choice = self._choice(found[0])
            bound = found[1] if bound is None else bound
            over = np.array([excess(self.limits[i], choice) if whole else 0.0 for i in keep])
            if not over.any():
                return Answer(choice, bound / scale + float(least.sum()))
            tightened = over / self.scale[keep] + TOLERANCE * 2.0**attempt
            room = np.where(over > 0, room - tightened, room)
        names = ", ".join(self.limits[i].name for i, o in zip(keep, over, strict=True) if o)
        raise ValueError(
            f"HiGHS exceeds the limit of {names} by a rounding error, however often it is "
            "tightened. Loosen it by a millionth, or use the 'ilp' solver."
        )

    def relax_limits(self) -> NDArray[np.intp]:
        """intp [U], the choice that exceeds the limits least: the sum of its relative excesses."""
        size = [
            abs(limit.limit) or LARGEST * s
            for limit, s in zip(self.limits, self.scale, strict=True)
        ]
        elastic = -np.diag(np.array(size) / self.scale)
        rows = np.concatenate([self.rows, elastic], axis=1)
        cost = np.append(np.zeros(self.rows.shape[1]), np.full(len(size), OPTIMUM))
        found = self._run(cost, rows, self.room, True, 1e-4)
        if found is None:
            raise ValueError("HiGHS finds no choice even without limits; please report this.")
        return self._choice(found[0])

    def _run(
        self,
        cost: NDArray[np.float64],
        rows: NDArray[np.float64],
        room: NDArray[np.float64],
        whole: bool,
        max_gap: float,
    ) -> tuple[NDArray[np.float64], float] | None:
        """Values of the K 0/1 variables and a bound; further columns are continuous, from 0 up."""
        # Imported where it is needed: most answers need no HiGHS, and loading it takes longer.
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, hstack

        count, more = self.rows.shape[1], len(cost) - self.rows.shape[1]
        unit = np.nonzero(self.options)[0]
        one_each = csr_array((np.ones(count), (unit, np.arange(count))))
        one_each = hstack([one_each, csr_array((one_each.shape[0], more))], format="csr")
        integral = np.append(np.full(count, float(whole)), np.zeros(more))
        with _no_stdout():
            result = milp(
                cost,
                integrality=integral,
                bounds=Bounds(0, np.append(np.ones(count), np.full(more, np.inf))),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    LinearConstraint(csr_array(rows), -np.inf, room),
                ],
                options={"mip_rel_gap": max_gap, "time_limit": MAX_SECONDS},
            )
        if result.x is not None:
            bound = result.fun if not whole else result.mip_dual_bound
            return result.x[:count], float(bound)
        if result.status == 1:
            raise ValueError(
                f"HiGHS found no choice within all limits in {MAX_SECONDS:.0f} s, and no proof "
                "that there is none. Loosen a limit a little."
            )
        return None

    def _choice(self, values: NDArray[np.float64]) -> NDArray[np.intp]:
        """intp [U], the option of every unit with the largest value [K]."""
        table = np.full(self.options.shape, -1.0)
        table[self.options] = values
        choice: NDArray[np.intp] = table.argmax(axis=1)
        return choice


@contextmanager
def _no_stdout() -> Iterator[None]:
    """Keep what HiGHS prints with C's printf, a left-over debugging line, out of the output."""
    if os.name != "posix":  # C's buffer cannot be flushed from Python elsewhere
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)

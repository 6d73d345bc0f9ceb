"""HAWQ-V2's choice: the Pareto frontier of plans that follow the ranking by sensitivity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..hull import lower_hull
from ..problem import Problem, Solution
from . import SOLVERS
from .baq import known_weights, sensitivity
from .certified import pareto
from .dp import trace

MAX_STATES = 4_000  # per unit
MULTIPLIERS = 64  # tried for the Lagrangian bound


@SOLVERS.register("hawq_v2")
def hawq_v2(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Pick the Pareto-best plan in which more sensitive units never get fewer bits (HAWQ-V2).

    From the paper: a configuration's score is Omega, the sum of its units' (average Hessian trace
    times squared error), here the problem's losses, so a table of the trace metric gives HAWQ-V2's
    own; the search space keeps to the order of sensitivity; and of the Pareto frontier of (bytes,
    Omega) the best point within the budget is taken.

    Not from the paper: a unit's sensitivity is its fitted loss per weight at equal bits
    (``log2(c_u / n_u)``, see ``baq``), which is proportional to the average trace times the
    variance of the weights' error, because a table of losses has no trace of its own.  Formats
    count as wider or narrower by their bits per weight over all units.  Units with one allowed
    format stay outside the order.  The frontier comes from a dynamic program that is exact up to
    MAX_STATES states per unit and keeps those of the least Lagrangian bound beyond, where the
    paper enumerates.

    Args:
        problem: The table as arrays, with ``unit_weights``.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic.

    Returns:
        The plan, or the smallest one if none in order of sensitivity fits.  The lower bound is
        that of all plans, in order or not.

    Raises:
        ValueError: If even the smallest plan does not fit, the numbers of weights are unknown, or
            there are further constraints.

    References:
        Dong et al. (2020), "HAWQ-V2: Hessian aware trace-weighted quantization of neural
        networks", NeurIPS, arXiv 1911.03852.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> plan = hawq_v2(toy_problem(), max_bytes=160)
        >>> plan.choice.tolist(), plan.bytes, plan.loss
        ([2, 1, 1, 1], 144, 0.0274658203125)
    """
    problem.require_bytes_only("hawq_v2")
    problem.check_feasible(max_bytes)
    hull = lower_hull(problem)
    ranking = _Ranking.build(problem, known_weights(problem, "hawq_v2"))
    choice = hull.start.copy()
    fixed = np.setdiff1d(np.arange(len(choice)), ranking.units)
    room = max_bytes - int(problem.bytes[fixed, choice[fixed]].sum())
    slopes = hull.slope if len(hull.slope) else np.ones(1)
    found = _best(ranking, room, np.geomspace(slopes.max() * 2, slopes.min() / 2, MULTIPLIERS))
    if found is not None:
        choice[ranking.units] = found
    return problem.evaluate(choice, hull.relax(problem, max_bytes).bound)


@dataclass(frozen=True, slots=True)
class _Ranking:
    """Units with a choice, the most sensitive first, and the width of formats.

    Attributes:
        units: intp [J].
        bytes: int64 [J, F].
        loss: float64 [J, F], inf where not allowed.
        width: intp [F], rank of the format by bits per weight; equal bits share a rank.
    """

    units: NDArray[np.intp]
    bytes: NDArray[np.int64]
    loss: NDArray[np.float64]
    width: NDArray[np.intp]

    @classmethod
    def build(cls, problem: Problem, weights: NDArray[np.int64]) -> _Ranking:
        order = np.argsort(-sensitivity(problem, weights), kind="stable")
        units = order[problem.allowed[order].sum(axis=1) > 1]
        allowed = problem.allowed[units]
        total = np.where(allowed, problem.bytes[units], 0).sum(axis=0)
        bits = total / np.maximum((allowed * weights[units, None]).sum(axis=0), 1)
        width = np.unique(bits, return_inverse=True)[1].reshape(-1)
        return cls(units, problem.bytes[units], problem.loss[units], width)

    def completions(
        self, price: NDArray[np.float64], multiplier: NDArray[np.float64]
    ) -> list[NDArray[np.float64]]:
        """Least of ``price + multiplier * bytes`` that units j... can add below a width.

        Args:
            price: float64 [J, F].
            multiplier: float64 [M].

        Returns:
            For j = 0..J, float64 [M, W]: the sum over units j... when unit j may be at most as
            wide as each of the W widths; inf where no order allows it.
        """
        widths = int(self.width.max()) + 1
        rest = [np.zeros((len(multiplier), widths))]
        for size, row in zip(self.bytes[::-1], price[::-1], strict=True):
            best = np.full((len(multiplier), widths), np.inf)
            for f in np.flatnonzero(row < np.inf):
                w = self.width[f]
                best[:, w] = np.minimum(best[:, w], row[f] + multiplier * size[f] + rest[-1][:, w])
            rest.append(np.minimum.accumulate(best, axis=1))
        return rest[::-1]


def _best(
    ranking: _Ranking, room: int, multipliers: NDArray[np.float64]
) -> NDArray[np.intp] | None:
    """intp [J], the formats of least loss in order of sensitivity within ``room`` bytes."""
    closed = np.where(ranking.loss < np.inf, 0.0, np.inf)
    needed = [rest[0] for rest in ranking.completions(closed, np.ones(1))]
    widest = int(ranking.width.max())
    if needed[0][widest] > room:
        return None
    dual = ranking.completions(ranking.loss, multipliers)[0][:, widest] - multipliers * room
    price = multipliers[[int(dual.argmax())]]
    rest = [values[0] for values in ranking.completions(ranking.loss, price)]

    size, loss, width = np.zeros(1, dtype=np.int64), np.zeros(1), np.array([widest])
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    for unit in range(len(ranking.units)):
        kept = []
        for w in np.unique(ranking.width):
            options = np.flatnonzero((ranking.width == w) & (ranking.loss[unit] < np.inf))
            parents = np.flatnonzero(width >= w)
            total = (size[parents, None] + ranking.bytes[unit, options]).ravel()
            score = (loss[parents, None] + ranking.loss[unit, options]).ravel()
            fits = np.flatnonzero(total + needed[unit + 1][w] <= room)
            fits = fits[pareto(total[fits], score[fits])]
            parent, option = np.divmod(fits, max(len(options), 1))
            kept.append(
                (total[fits], score[fits], np.full(len(fits), w), parents[parent], options[option])
            )
        size, loss, width, parent, option = (np.concatenate(c) for c in zip(*kept, strict=True))
        bound = loss + price * size + rest[unit + 1][width]
        live = bound.argsort(kind="stable")[:MAX_STATES]
        size, loss, width = size[live], loss[live], width[live]
        history.append((parent[live].astype(np.int32), option[live].astype(np.int16)))
    return trace(history, int(loss.argmin()))

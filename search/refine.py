"""Refinement: re-price a plan at its own quantized weights, take a guarded step, repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .oracle import Choice, Oracle
from .problem import Problem
from .solvers import SOLVERS

FIRST_MULTIPLIER = 2.0  # on the second-order term, in the middle of the first grid
GRID = (0.5, 0.7, 1.0, 1.4, 2.0)  # factors on the last accepted multiplier
NEIGHBOURS = (0.84, 1.19)  # factors on the best of the grid
CAP = 0.5  # share of the best candidate's changes that another one may make
SHRINK = 4.0  # the multiplier grows by this when no candidate helps
SHRINKS = 1  # times, before the search stops
_PENALTIES = 12  # bisection steps for the price of a change


class LocalPrices(Protocol):
    """Second-order prices of changing one unit of a plan, as ``sensitivity.linearize`` gives.

    ``first`` [N, U, F] nats per token and per sequence, ``second`` [U, F] nats per token; both
    are zero where a unit keeps its format.
    """

    @property
    def first(self) -> NDArray[np.float32]: ...  # noqa: D102

    @property
    def second(self) -> NDArray[np.float64]: ...  # noqa: D102


Linearize = Callable[[Choice, int], LocalPrices]  # the plan and the number of the step


@dataclass(frozen=True, slots=True)
class Step:
    """One candidate that was measured.

    Attributes:
        number: Step it belongs to, from 1.
        multiplier: On the second-order term.
        changed: Units whose format differs from the plan before the step.
        predicted: Predicted change of KL, nats per token.
        difference: Measured change of KL on sequences the prices do not come from, paired.
        difference_stderr: Its standard error.
        accepted: Whether the search went on from it.
    """

    number: int
    multiplier: float
    changed: int
    predicted: float
    difference: float
    difference_stderr: float
    accepted: bool = False


@dataclass(frozen=True, slots=True)
class LocalModel:
    """The separable model around one plan.

    Attributes:
        prices: The local prices.
        multiplier: On their second-order term.
    """

    prices: LocalPrices
    multiplier: float

    def loss(self, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """float64 [U, F], change of KL in nats per token; ``weights`` [N] resample sequences."""
        first: NDArray[np.float64] = np.average(self.prices.first, axis=0, weights=weights)
        return first + self.multiplier * self.prices.second


@dataclass(frozen=True, slots=True)
class Refined:
    """Outcome of :func:`refine`.

    Attributes:
        choices: intp [U] each: the start and the plan after every accepted step.
        kl: Measured KL of those on the guard sequences, nats per token.
        steps: All candidates in the order they were measured.
        last: The separable model that the last accepted plan was solved from.
    """

    choices: list[Choice]
    kl: list[float]
    steps: list[Step]
    last: LocalModel | None = None

    @property
    def choice(self) -> Choice:
        """The last accepted plan."""
        return self.choices[-1]


def refine(
    problem: Problem,
    max_bytes: int,
    start: Choice,
    linearize: Linearize,
    oracle: Oracle,
    *,
    steps: int,
    solver: str = "certified",
    seed: int = 0,
    report: Callable[[Step], None] = lambda _: None,
) -> Refined:
    """Sequential quadratic programming over integer plans, with a measured trust region.

    One-shot prices are exact to second order at the original weights only: below about 3.5 bits
    errors are large and act on each other.  At the current plan c, every unit's change to f is
    priced as ``mean <g_u, W_f - W_c> + m * (W_f - W_c)' F_u (W_f - W_c) / 2`` with the exact
    gradient g of KL(p_original || p_plan) and the Fisher form F of the quantized model: still
    separable, so the same solver applies.  Units also act on each other, so a full step goes
    too far: several trust regions (the multiplier m, and a limit on the units changed) give
    candidates, and the one with the least KL *measured* on sequences the prices do not come from
    is accepted if it beats the plan by more than its paired standard error.  If none does, the
    region shrinks; then the search stops.

    Args:
        problem: The table as arrays; its losses are not used, its bytes and limits are.
        max_bytes: The most bytes the plan may take.
        start: intp [U], the plan to start from.
        linearize: Prices changes of a plan; called once per step.
        oracle: Measures KL on sequences that ``linearize`` does not see.
        steps: The most steps to accept.
        solver: Name of the solver of the separable problem.
        seed: Its seed.
        report: Called with every measured candidate.

    References:
        Nocedal and Wright (2006), Numerical Optimization, ch. 4 and 18.
    """
    guard = range(oracle.sequences)
    choices, kls = [start], [float(oracle.kl([start], guard).mean())]
    history: list[Step] = []
    last: LocalModel | None = None
    multiplier = FIRST_MULTIPLIER
    for number in range(1, steps + 1):
        region = _Region(
            problem, max_bytes, choices[-1], linearize(choices[-1], number), oracle, solver, seed
        )
        for _ in range(1 + SHRINKS):
            tried = region.search(number, multiplier)
            best = min(tried, key=lambda t: t.step.difference, default=None)
            helps = best is not None and best.step.difference < -best.step.difference_stderr
            for trial in tried:
                history.append(replace(trial.step, accepted=helps and trial is best))
                report(history[-1])
            if helps:
                break
            multiplier *= SHRINK
        if best is None or not helps:
            break
        choices.append(best.choice)
        kls.append(kls[-1] + best.step.difference)
        multiplier = best.step.multiplier
        last = LocalModel(region.prices, multiplier)
    return Refined(choices, kls, history, last)


class _Trial(NamedTuple):
    step: Step
    choice: Choice


@dataclass(frozen=True, slots=True)
class _Region:
    """Everything that is known at one plan, and the search for the step to take from it."""

    problem: Problem
    max_bytes: int
    current: Choice
    prices: LocalPrices
    oracle: Oracle
    solver: str
    seed: int

    def search(self, number: int, multiplier: float) -> list[_Trial]:
        """Measure a grid of multipliers, then around its best one, and half of its changes."""
        grid = [(multiplier * g, self._solve(multiplier * g)) for g in GRID]
        tried = self._measure(number, grid, ())
        if not tried:
            return []
        best = min(tried, key=lambda t: t.step.difference)
        m = best.step.multiplier
        near = [(m * n, self._solve(m * n)) for n in NEIGHBOURS]
        near.append((m, self._capped(m, int(CAP * best.step.changed))))
        return tried + self._measure(number, near, [trial.choice for trial in tried])

    def _solve(self, multiplier: float, penalty: float = 0.0) -> Choice:
        """The best plan of the separable model, with a price on every change."""
        loss = LocalModel(self.prices, multiplier).loss() + penalty
        loss[np.arange(len(self.current)), self.current] = 0.0
        local = replace(
            self.problem,
            loss=np.where(self.problem.allowed, loss, np.inf),
            oracle=None,
            scores=None,
        )
        return SOLVERS.get(self.solver)(local, self.max_bytes, seed=self.seed).choice

    def _capped(self, multiplier: float, most: int) -> Choice:
        """The plan of the least price per change that changes at most ``most`` units."""
        low, high = 0.0, float(self.prices.second.max() + np.abs(self.prices.first.mean(0)).max())
        best = self.current
        for _ in range(_PENALTIES):
            middle = (low + high) / 2
            choice = self._solve(multiplier, middle)
            if (choice != self.current).sum() <= most:
                best, high = choice, middle
            else:
                low = middle
        return best

    def _measure(
        self, number: int, candidates: Sequence[tuple[float, Choice]], known: Sequence[Choice]
    ) -> list[_Trial]:
        """Measure the candidates that are new, paired with the current plan."""
        seen = {choice.tobytes() for choice in (self.current, *known)}
        fresh: dict[bytes, tuple[float, Choice]] = {}
        for m, choice in candidates:
            if choice.tobytes() not in seen:
                fresh.setdefault(choice.tobytes(), (m, choice))
        if not fresh:
            return []
        choices = [choice for _, choice in fresh.values()]
        kl = self.oracle.kl([self.current, *choices], range(self.oracle.sequences))
        predicted = LocalModel(self.prices, 1.0).loss()
        rows = np.arange(len(self.current))
        return [
            _Trial(
                Step(
                    number,
                    m,
                    int((choice != self.current).sum()),
                    float(predicted[rows, choice].sum()),
                    float(difference.mean()),
                    _standard_error(difference),
                ),
                choice,
            )
            for (m, choice), difference in zip(fresh.values(), kl[1:] - kl[0], strict=True)
        ]


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0

"""Refinement: re-price a plan at its own quantized weights, take a guarded step, repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .oracle import Choice, Oracle
from .problem import Problem
from .solvers.certified import certified

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
        current: intp [U], the plan.
        multiplier: On their second-order term.
        penalty: On every change of a unit, nats per token.
    """

    prices: LocalPrices
    current: Choice
    multiplier: float
    penalty: float = 0.0

    def loss(self, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """float64 [U, F], change of KL in nats per token; ``weights`` [N] resample ``first``."""
        if weights is None:
            weights = np.ones(len(self.prices.first))
        first = np.tensordot(weights / weights.sum(), self.prices.first, 1)
        loss: NDArray[np.float64] = first + self.multiplier * self.prices.second + self.penalty
        loss[np.arange(len(loss)), self.current] = 0.0
        return loss


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
    report: Callable[[Step], None] = lambda _: None,
) -> Refined:
    """Sequential quadratic programming over integer plans, with a measured trust region.

    One-shot prices are exact to second order at the original weights only: below about 3.5 bits
    errors are large and act on each other.  At the current plan c, every unit's change to f is
    priced as ``mean <g_u, W_f - W_c> + m * (W_f - W_c)' F_u (W_f - W_c) / 2`` with the exact
    gradient g of KL(p_original || p_plan) and the Fisher form F of the quantized model: still
    separable, so the exact solver applies.  Units also act on each other, so a full step goes
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
        region = _Region(problem, max_bytes, choices[-1], linearize(choices[-1], number), oracle)
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
        last = best.model
    return Refined(choices, kls, history, last)


class _Trial(NamedTuple):
    step: Step
    choice: Choice
    model: LocalModel


@dataclass(frozen=True, slots=True)
class _Region:
    """Everything that is known at one plan, and the search for the step to take from it."""

    problem: Problem
    max_bytes: int
    current: Choice
    prices: LocalPrices
    oracle: Oracle

    def search(self, number: int, multiplier: float) -> list[_Trial]:
        """Measure a grid of multipliers, then around its best one, and half of its changes."""
        tried = self._measure(number, [self._model(multiplier * g) for g in GRID], ())
        if not tried:
            return []
        best = min(tried, key=lambda t: t.step.difference)
        m = best.step.multiplier
        near = [self._model(m * n) for n in NEIGHBOURS]
        if not self.problem.constraints:  # a solve is slow then, and this takes many
            near.append(self._capped(m, int(CAP * best.step.changed)))
        return tried + self._measure(number, near, [trial.choice for trial in tried])

    def _model(self, multiplier: float, penalty: float = 0.0) -> LocalModel:
        return LocalModel(self.prices, self.current, multiplier, penalty)

    def _solve(self, model: LocalModel) -> Choice:
        """The best plan of the separable model."""
        loss = np.where(self.problem.allowed, model.loss(), np.inf)
        local = replace(self.problem, loss=loss, oracle=None, scores=None)
        return certified(local, self.max_bytes).choice

    def _capped(self, multiplier: float, most: int) -> LocalModel:
        """The least price per change at which at most ``most`` units change."""
        low, high = 0.0, float(np.abs(self._model(multiplier).loss()).max())
        for _ in range(_PENALTIES):
            middle = (low + high) / 2
            choice = self._solve(self._model(multiplier, middle))
            if (choice != self.current).sum() <= most:
                high = middle
            else:
                low = middle
        return self._model(multiplier, high)

    def _measure(
        self, number: int, models: Sequence[LocalModel], known: Sequence[Choice]
    ) -> list[_Trial]:
        """Measure the models' plans that are new, paired with the current plan."""
        seen = {choice.tobytes() for choice in (self.current, *known)}
        fresh: dict[bytes, tuple[LocalModel, Choice]] = {}
        for model in models:
            choice = self._solve(model)
            if choice.tobytes() not in seen:
                fresh.setdefault(choice.tobytes(), (model, choice))
        if not fresh:
            return []
        choices = [choice for _, choice in fresh.values()]
        kl = self.oracle.kl([self.current, *choices], range(self.oracle.sequences))
        kl = np.nan_to_num(kl, nan=np.inf)  # a plan whose activations overflow
        predicted = self._model(1.0).loss()
        rows = np.arange(len(self.current))
        return [
            _Trial(
                Step(
                    number,
                    model.multiplier,
                    int((choice != self.current).sum()),
                    float(predicted[rows, choice].sum()),
                    float(difference.mean()),
                    _standard_error(difference),
                ),
                choice,
                model,
            )
            for (model, choice), difference in zip(fresh.values(), kl[1:] - kl[0], strict=True)
        ]


def _standard_error(values: NDArray[np.float64]) -> float:
    if not np.isfinite(values).all():
        return 0.0
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0

"""Refinement: re-price a plan at its own quantized weights, take a guarded step, repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .oracle import Choice, Oracle
from .problem import Problem
from .solvers import SOLVERS

MULTIPLIERS = (1.0, 2.0, 4.0)  # on the second-order term, relative to the last accepted one
CAPS = (1.0, 0.5, 0.25)  # shares of the changed units that a candidate may change
SHRINK = 4.0  # the multiplier grows by this when no candidate helps
SHRINKS = 2  # times, before the search stops
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
class Refined:
    """Outcome of :func:`refine`.

    Attributes:
        choices: intp [U] each: the start and the plan after every accepted step.
        kl: Measured KL of those on the guard sequences, nats per token.
        steps: All candidates in the order they were measured.
    """

    choices: list[Choice]
    kl: list[float]
    steps: list[Step]

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
    separable, so the same solver applies.  Several trust regions (the multiplier m, and a limit
    on the units changed) give candidates; the one with the least KL *measured* on sequences the
    prices do not come from is accepted if it beats the plan by more than its paired standard
    error.  If none does, the region shrinks; then the search stops.

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
    multiplier = 1.0
    for number in range(1, steps + 1):
        current = choices[-1]
        prices = linearize(current, number)
        for _ in range(1 + SHRINKS):
            tried, found = _measured(
                _candidates(problem, max_bytes, current, prices, multiplier, solver, seed),
                current,
                prices,
                oracle,
                number,
            )
            best = min(range(len(tried)), key=lambda i: tried[i].difference, default=None)
            helps = best is not None and tried[best].difference < -tried[best].difference_stderr
            for i, step in enumerate(tried):
                history.append(replace(step, accepted=helps and i == best))
                report(history[-1])
            if helps:
                break
            multiplier *= SHRINK
        if best is None or not helps:
            break
        choices.append(found[best])
        kls.append(kls[-1] + tried[best].difference)
        multiplier = max(1.0, tried[best].multiplier / 2)
    return Refined(choices, kls, history)


def _candidates(
    problem: Problem,
    max_bytes: int,
    current: Choice,
    prices: LocalPrices,
    multiplier: float,
    solver: str,
    seed: int,
) -> Iterator[tuple[float, Choice]]:
    """Plans of several trust regions, each with the multiplier it was solved with."""
    solve = SOLVERS.get(solver)
    first = prices.first.mean(axis=0, dtype=np.float64)
    for factor in MULTIPLIERS:
        m = multiplier * factor
        loss = np.where(problem.allowed, first + m * prices.second, np.inf)
        local = replace(problem, loss=loss, oracle=None, scores=None)

        def choose(penalty: float, local: Problem = local) -> Choice:
            priced = local.loss + penalty
            rows = np.arange(len(current))
            priced[rows, current] = local.loss[rows, current]
            return solve(replace(local, loss=priced), max_bytes, seed=seed).choice

        free = choose(0.0)
        yield m, free
        changed = int((free != current).sum())
        spread = float(np.abs(loss[np.isfinite(loss)]).max())
        for cap in CAPS[1:]:
            yield m, _capped(choose, current, int(cap * changed), spread)


def _capped(
    choose: Callable[[float], Choice], current: Choice, most: int, spread: float
) -> Choice:
    """The plan of the least price per change that changes at most ``most`` units."""
    low, high = 0.0, spread
    best = current
    for _ in range(_PENALTIES):
        middle = (low + high) / 2
        choice = choose(middle)
        if (choice != current).sum() <= most:
            best, high = choice, middle
        else:
            low = middle
    return best


def _measured(
    candidates: Iterator[tuple[float, Choice]],
    current: Choice,
    prices: LocalPrices,
    oracle: Oracle,
    number: int,
) -> tuple[list[Step], list[Choice]]:
    """Measure different candidates, paired with the current plan."""
    unique: dict[bytes, tuple[float, Choice]] = {}
    for m, choice in candidates:
        if (choice != current).any():
            unique.setdefault(choice.tobytes(), (m, choice))
    if not unique:
        return [], []
    choices: Sequence[Choice] = [choice for _, choice in unique.values()]
    kl = oracle.kl([current, *choices], range(oracle.sequences))
    differences = kl[1:] - kl[0]
    rows = np.arange(len(current))
    first = prices.first.mean(axis=0, dtype=np.float64)
    steps = [
        Step(
            number,
            m,
            int((choice != current).sum()),
            float((first + prices.second)[rows, choice].sum()),
            float(difference.mean()),
            float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else 0.0,
        )
        for (m, choice), difference in zip(unique.values(), differences, strict=True)
    ]
    return steps, list(choices)

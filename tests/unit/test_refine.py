"""Refinement on a model whose KL is known: a quadratic form in which units act on each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from bitplan.search.oracle import Choice, Oracle
from bitplan.search.problem import Constraint, Problem
from bitplan.search.refine import LocalModel, Step, refine
from bitplan.search.solvers import SOLVERS

UNITS, FORMATS, SIZE = 12, 4, 3  # weights per unit
PRICED, GUARD = 24, 16  # sequences that prices come from, and those kept apart


@dataclass(frozen=True)
class Prices:
    first: NDArray[np.float32]
    second: NDArray[np.float64]


class Quadratic:
    """KL_n(c) = e' (H + noise_n) e / 2 with e the quantization errors of all units.

    H couples the units: errors of the same sign, which is what rounding to few bits gives, add up.
    """

    def __init__(self, seed: int, coupling: float = 0.6, noise: float = 0.05) -> None:
        rng = np.random.default_rng(seed)
        count = UNITS * SIZE
        scale = np.repeat(np.exp(rng.normal(0, 0.7, UNITS)), SIZE)
        shared = rng.normal(0.6, 1.0, (3, count))  # a few directions that all units share
        form = np.eye(count) + coupling * shared.T @ shared
        self.form = form * np.outer(scale, scale)
        self.errors = np.zeros((UNITS, FORMATS, count))
        for u in range(UNITS):
            part = slice(u * SIZE, (u + 1) * SIZE)
            for f in range(FORMATS):
                self.errors[u, f, part] = rng.normal(0.3, 1.0, SIZE) * 2.0**-f
        self.forms = np.array(
            [self.form * (1 + noise * rng.normal()) for _ in range(PRICED + GUARD)]
        )
        self.bytes = np.arange(1, FORMATS + 1) * rng.integers(5, 40, (UNITS, 1))
        self.linearized: list[tuple[tuple[int, ...], int]] = []
        self.sign = 1.0

    def error(self, choice: Choice) -> NDArray[np.float64]:
        summed: NDArray[np.float64] = self.errors[np.arange(UNITS), choice].sum(axis=0)
        return summed

    def true(self, choice: Choice) -> float:
        e = self.error(choice)
        return float(e @ self.form @ e / 2)

    def problem(self) -> Problem:
        """Separable second-order prices at the original weights, cross terms left out."""
        loss = np.einsum("ufi,ij,ufj->uf", self.errors, self.form, self.errors) / 2
        names = tuple(f"u{u}" for u in range(UNITS))
        return Problem(names, tuple("abcd"), self.bytes.astype(np.int64), loss)

    def linearize(self, choice: Choice, number: int) -> Prices:
        """Exact gradient per sequence and exact curvature of changing one unit."""
        self.linearized.append((tuple(choice.tolist()), number))
        e = self.error(choice)
        change = self.errors - self.errors[np.arange(UNITS), choice][:, None]
        first = np.einsum("nij,i,ufj->nuf", self.forms[:PRICED], e, change) * self.sign
        second = np.einsum("ufi,ij,ufj->uf", change, self.form, change) / 2
        return Prices(first.astype(np.float32), second)

    def oracle(self) -> Oracle:
        def measure(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
            errors = np.array([self.error(choice) for choice in choices])
            forms = self.forms[PRICED + sequences.start : PRICED + sequences.stop]
            kl: NDArray[np.float64] = np.einsum("bi,nij,bj->bn", errors, forms, errors) / 2
            return kl

        return Oracle(measure, GUARD, 1, max_tokens=1 << 60)


def budget(model: Quadratic, share: float = 0.4) -> int:
    low, high = model.bytes.min(axis=1).sum(), model.bytes.max(axis=1).sum()
    return int(low + share * (high - low))


def start_of(model: Quadratic, max_bytes: int) -> Choice:
    return SOLVERS.get("certified")(model.problem(), max_bytes).choice


@pytest.mark.parametrize("seed", range(6))
def test_it_beats_the_separable_optimum_within_the_bytes(seed: int) -> None:
    model = Quadratic(seed)
    limit = budget(model)
    start = start_of(model, limit)
    found = refine(model.problem(), limit, start, model.linearize, model.oracle(), steps=4)
    assert len(found.choices) > 1
    assert model.true(found.choice) < model.true(start)
    for before, after in pairwise(found.choices):
        assert model.true(after) < model.true(before), "every accepted step helps"
    rows = np.arange(UNITS)
    for choice in found.choices:
        assert model.bytes[rows, choice].sum() <= limit
    for choice, kl in zip(found.choices, found.kl, strict=True):
        assert kl == pytest.approx(model.oracle().mean_kl(choice), rel=1e-9)


def test_it_gains_most_of_what_exhaustive_exchange_gains() -> None:
    """Against a local search over all pairs of changes on the true KL."""
    gained = []
    for seed in range(6):
        model = Quadratic(seed)
        limit = budget(model)
        start = start_of(model, limit)
        found = refine(model.problem(), limit, start, model.linearize, model.oracle(), steps=4)
        best = exchange(model, start, limit)
        gained.append((model.true(start) - model.true(found.choice)) / (model.true(start) - best))
    assert np.mean(gained) > 0.5


def exchange(model: Quadratic, choice: Choice, limit: int) -> float:
    """True KL after the best change of two units, again and again until none helps."""
    rows = np.arange(UNITS)
    least = model.true(choice)
    while True:
        pairs = np.array(
            [(u, f, v, g) for u in rows for v in rows[u + 1 :] for f in range(4) for g in range(4)]
        )
        many = np.repeat(choice[None], len(pairs), axis=0)
        index = np.arange(len(pairs))
        many[index, pairs[:, 0]], many[index, pairs[:, 2]] = pairs[:, 1], pairs[:, 3]
        many = many[model.bytes[rows, many].sum(axis=1) <= limit]
        errors = model.errors[rows, many].sum(axis=1)
        kl = np.einsum("bi,ij,bj->b", errors, model.form, errors) / 2
        if kl.min() >= least * (1 - 1e-12):
            return least
        least, choice = float(kl.min()), many[kl.argmin()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_measured_kl_never_rises(seed: int, noise: float) -> None:
    model = Quadratic(seed, noise=noise)
    limit = budget(model, 0.3)
    found = refine(
        model.problem(), limit, start_of(model, limit), model.linearize, model.oracle(), steps=3
    )
    assert all(after < before for before, after in pairwise(found.kl))
    assert found.kl[-1] == pytest.approx(model.oracle().mean_kl(found.choice), rel=1e-9)


def test_the_same_start_gives_the_same_steps() -> None:
    runs = []
    for _ in range(2):
        model = Quadratic(2)
        limit = budget(model)
        reported: list[Step] = []
        found = refine(
            model.problem(),
            limit,
            start_of(model, limit),
            model.linearize,
            model.oracle(),
            steps=3,
            report=reported.append,
        )
        assert reported == found.steps
        runs.append((found.steps, found.kl, [c.tolist() for c in found.choices]))
    assert runs[0] == runs[1]


def test_every_accepted_step_is_one_call_of_linearize_at_the_plan_before() -> None:
    model = Quadratic(1)
    limit = budget(model)
    found = refine(
        model.problem(), limit, start_of(model, limit), model.linearize, model.oracle(), steps=2
    )
    at = [tuple(choice.tolist()) for choice in found.choices]
    assert model.linearized == [(at[i], i + 1) for i in range(len(model.linearized))]
    assert len(model.linearized) <= 2
    accepted = [step for step in found.steps if step.accepted]
    assert [step.number for step in accepted] == list(range(1, len(found.choices)))
    for step in accepted:
        assert step.difference < -step.difference_stderr
        assert step.changed == (found.choices[step.number] != found.choices[step.number - 1]).sum()


def test_it_stops_where_nothing_helps() -> None:
    """Without coupling or noise the separable optimum is the optimum."""
    model = Quadratic(3, coupling=0.0, noise=0.0)
    limit = budget(model)
    start = start_of(model, limit)
    found = refine(model.problem(), limit, start, model.linearize, model.oracle(), steps=5)
    assert [c.tolist() for c in found.choices] == [start.tolist()]
    assert not any(step.accepted for step in found.steps)
    assert len(model.linearized) == 1
    assert found.last is None


@pytest.mark.parametrize("seed", range(3))
def test_misleading_prices_are_rejected(seed: int) -> None:
    model = Quadratic(seed, coupling=0.0, noise=0.0)
    limit = budget(model)
    start = start_of(model, limit)
    model.sign = -10.0
    found = refine(model.problem(), limit, start, model.linearize, model.oracle(), steps=3)
    assert found.steps, "candidates were measured"
    assert all(step.difference > 0 for step in found.steps)
    assert found.choice.tolist() == start.tolist()
    assert found.kl == [pytest.approx(model.true(start))]


def test_gains_within_the_noise_are_not_taken() -> None:
    """KL that falls on average by less than its paired standard error."""
    model = Quadratic(0)
    limit = budget(model)
    start = start_of(model, limit)
    spread = np.random.default_rng(0).normal(size=GUARD)
    spread -= spread.mean()

    def measure(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        changed = np.array([float((c != start).any()) for c in choices])
        kl: NDArray[np.float64] = changed[:, None] * (spread - 0.5 * spread.std() / GUARD**0.5)
        return 1.0 + kl

    oracle = Oracle(measure, GUARD, 1, max_tokens=1 << 60)
    found = refine(model.problem(), limit, start, model.linearize, oracle, steps=3)
    assert found.steps and all(step.difference < 0 for step in found.steps)
    assert len(found.choices) == 1


def test_no_steps_measure_the_start_only() -> None:
    model = Quadratic(0)
    limit = budget(model)
    start = start_of(model, limit)
    oracle = model.oracle()
    found = refine(model.problem(), limit, start, model.linearize, oracle, steps=0)
    assert found.choice is start and not model.linearized
    assert oracle.tokens == GUARD


def test_pins_and_further_limits_hold_for_every_plan() -> None:
    model = Quadratic(4)
    problem = model.problem()
    loss = problem.loss.copy()
    loss[3, [0, 1, 3]] = np.inf
    cost = np.random.default_rng(0).random(loss.shape)
    limit = float(0.5 * cost.min(axis=1).sum() + 0.5 * cost.max(axis=1).sum())
    problem = Problem(
        problem.units,
        problem.formats,
        problem.bytes,
        loss,
        constraints=(Constraint("latency", cost, limit, "ms"),),
    )
    most = budget(model)
    start = SOLVERS.get("certified")(problem, most).choice
    found = refine(problem, most, start, model.linearize, model.oracle(), steps=3)
    assert len(found.choices) > 1
    rows = np.arange(UNITS)
    for choice in found.choices:
        assert choice[3] == 2
        assert cost[rows, choice].sum() <= limit
        assert problem.bytes[rows, choice].sum() <= most


def test_the_local_model_resamples_the_gradient() -> None:
    model = Quadratic(5)
    prices = model.linearize(np.zeros(UNITS, dtype=np.intp), 1)
    local = LocalModel(prices, np.zeros(UNITS, dtype=np.intp), 3.0)
    np.testing.assert_allclose(local.loss(), prices.first.mean(axis=0) + 3 * prices.second, 1e-5)
    weights = np.zeros(PRICED)
    weights[[4, 7]] = 1, 3
    np.testing.assert_allclose(
        local.loss(weights),
        (prices.first[4] + 3 * prices.first[7]) / 4 + 3 * prices.second,
        1e-5,
    )


def test_a_price_on_changes_leaves_the_current_formats_free() -> None:
    current = np.arange(UNITS) % FORMATS
    prices = Quadratic(5).linearize(current, 1)
    free, priced = (LocalModel(prices, current, 2.0, penalty).loss() for penalty in (0.0, 0.1))
    expected = np.full((UNITS, FORMATS), 0.1)
    expected[np.arange(UNITS), current] = 0.0
    np.testing.assert_allclose(priced - free, expected, atol=1e-12)
    assert (free[np.arange(UNITS), current] == 0).all()

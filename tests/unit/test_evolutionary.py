"""The evolutionary solvers against brute force and on made-up models with interactions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bitplan.search.levels import Ladder
from bitplan.search.oracle import Choice, Measure, Oracle
from bitplan.search.problem import Constraint, Problem
from bitplan.search.solvers import SOLVERS
from bitplan.search.solvers.evolutionary import LEAST_SEQUENCES, switch_levels
from bitplan.testing.problems import synthetic_problem

SEQUENCES, LENGTH = 16, 8
NAMES = ("evolutionary", "evolutionary_scratch")
evolutionary = SOLVERS.get("evolutionary")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return synthetic_problem(24, 6, seed=3)


def interacting_model(problem: Problem, seed: int = 0, sequences: int = SEQUENCES) -> Measure:
    """KL per sequence: the table's prices, off by a factor per unit, and neighbours' products."""
    random = np.random.default_rng(seed)
    shape = problem.loss.shape
    price = problem.loss * random.lognormal(0, 1.0, (shape[0], 1))
    weight = random.lognormal(0, 0.5, (sequences, shape[0]))
    product = random.uniform(-0.5, 1.0, shape[0] - 1)

    def measure(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        cost = price[np.arange(shape[0]), np.array(choices)]
        separable = cost @ weight[list(sequences)].T
        pairs = np.sqrt(cost[:, 1:] * cost[:, :-1]) @ product
        kl: NDArray[np.float64] = separable + pairs[:, None]
        return kl

    return measure


def oracle(measure: Measure, max_tokens: int = 30_000, log: Path | None = None) -> Oracle:
    return Oracle(measure, SEQUENCES, LENGTH, max_tokens=max_tokens, log=log)


def budget(problem: Problem, bpw: float = 3.4) -> int:
    return int(bpw * problem.weights / 8)


@pytest.mark.parametrize("seed", range(5))
def test_table_search_comes_near_the_optimum(seed: int) -> None:
    small = synthetic_problem(6, 4, seed)
    max_bytes = budget(small, 3.2)
    plans = (small.evaluate(np.array(c), np.inf) for c in itertools.product(range(4), repeat=6))
    optimum = min(plan.loss for plan in plans if plan.bytes <= max_bytes)
    assert evolutionary(small, max_bytes).loss == pytest.approx(optimum)
    scratch = SOLVERS.get("evolutionary_scratch")(small, max_bytes, seed=seed)
    assert scratch.loss <= 1.03 * optimum


def test_a_switch_among_equal_units_keeps_the_bytes() -> None:
    one = synthetic_problem(1, 6, seed=2)
    problem = Problem(
        tuple(f"u{u}" for u in range(9)),
        one.formats,
        np.repeat(one.bytes, 9, axis=0),
        np.repeat(one.loss, 9, axis=0),
    )
    ladder = Ladder.build(problem)
    # Only the step from level 2 to 3 is open, so every step has the same bytes.
    ladder = Ladder(ladder.format[:, 2:4], ladder.bytes[:, 2:4], np.ones(9, dtype=np.intp))
    level = np.array([0, 1] * 4 + [0])
    random = np.random.default_rng(0)
    for _ in range(50):
        switched = switch_levels(ladder, level, ladder.size(level), random)
        assert sorted((switched - level).tolist()) == [-1, *[0] * 7, 1]
        assert ladder.size(switched) == ladder.size(level)


def test_switches_never_leave_the_budget_and_spend_it(problem: Problem) -> None:
    ladder = Ladder.build(problem)
    max_bytes = budget(problem)
    random = np.random.default_rng(1)
    level = ladder.level(SOLVERS.get("certified")(problem, max_bytes).choice)
    largest = int(np.diff(ladder.bytes, axis=1).max())
    seen = {level.tobytes()}
    for _ in range(300):
        level = switch_levels(ladder, level, max_bytes, random)
        assert ((level >= 0) & (level <= ladder.top)).all()
        assert 0 <= max_bytes - ladder.size(level) < largest
        seen.add(level.tobytes())
    assert len(seen) > 250


@pytest.mark.parametrize("name", NAMES)
def test_more_tokens_never_make_the_plan_worse(problem: Problem, name: str) -> None:
    measure = interacting_model(problem)
    found = []
    for max_tokens in (SEQUENCES * LENGTH, 4_000, 12_000, 30_000):
        with_oracle = replace(problem, oracle=oracle(measure, max_tokens))
        choice = SOLVERS.get(name)(with_oracle, budget(problem), seed=4).choice
        found.append(float(measure([choice], range(SEQUENCES)).mean()))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.98 * found[0]


@pytest.mark.parametrize("seed", range(3))
def test_measuring_beats_the_certified_plan_where_units_interact(
    problem: Problem, seed: int
) -> None:
    measure = interacting_model(problem, seed)
    max_bytes = budget(problem)
    start = measure([SOLVERS.get("certified")(problem, max_bytes).choice], range(SEQUENCES))
    solution = evolutionary(replace(problem, oracle=oracle(measure)), max_bytes, seed=seed)
    assert solution.bytes <= max_bytes
    assert measure([solution.choice], range(SEQUENCES)).mean() < 0.97 * start.mean()
    assert solution.lower_bound <= solution.loss


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_tokens", [128, 129, 1000, 7777])
def test_tokens_are_counted_before_they_are_spent(
    problem: Problem, name: str, max_tokens: int
) -> None:
    measured = 0
    model = interacting_model(problem)

    def counting(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        nonlocal measured
        measured += len(choices) * len(sequences) * LENGTH
        return model(choices, sequences)

    asked = oracle(counting, max_tokens)
    SOLVERS.get(name)(replace(problem, oracle=asked), budget(problem))
    assert measured == asked.tokens <= max_tokens
    assert measured > max_tokens - 2000  # about one generation


@pytest.mark.parametrize("name", NAMES)
def test_a_small_budget_is_spent_on_generations(problem: Problem, name: str) -> None:
    """Work for nine plans on all sequences: three generations on all, or many on fewer."""
    many = 160
    model = interacting_model(problem, sequences=many)
    asked = Oracle(model, many, LENGTH, max_tokens=9 * many * LENGTH)
    choice = SOLVERS.get(name)(replace(problem, oracle=asked), budget(problem), seed=0).choice
    assert 0.95 * asked.max_tokens < asked.tokens <= asked.max_tokens
    first = Oracle(model, LEAST_SEQUENCES, LENGTH, max_tokens=LEAST_SEQUENCES * LENGTH)
    start = SOLVERS.get(name)(replace(problem, oracle=first), budget(problem), seed=0).choice
    before, after = model([start, choice], range(many)).mean(axis=1)
    assert after < 0.95 * before


def test_too_few_tokens_for_one_plan_are_refused(problem: Problem) -> None:
    asked = oracle(interacting_model(problem), SEQUENCES * LENGTH - 1)
    with pytest.raises(ValueError, match=r"127 tokens are too few .* takes 128 tokens"):
        evolutionary(replace(problem, oracle=asked), budget(problem))
    assert asked.tokens == 0


def test_a_killed_search_resumes_to_the_same_plan(problem: Problem, tmp_path: Path) -> None:
    model = interacting_model(problem)
    calls, limit = 0, 40

    def dying(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt
        return model(choices, sequences)

    max_bytes, log = budget(problem), tmp_path / "kl.jsonl"
    expected = evolutionary(replace(problem, oracle=oracle(model)), max_bytes, seed=9).choice
    with pytest.raises(KeyboardInterrupt):
        evolutionary(replace(problem, oracle=oracle(dying, log=log)), max_bytes, seed=9)
    calls, limit = 0, 10**9
    resumed = evolutionary(replace(problem, oracle=oracle(dying, log=log)), max_bytes, seed=9)
    assert (resumed.choice == expected).all()
    first_calls = calls
    calls = 0
    evolutionary(replace(problem, oracle=oracle(dying, log=log)), max_bytes, seed=9)
    assert (first_calls > 0, calls) == (True, 0)


def test_scratch_reads_nothing_of_the_table_but_bytes(problem: Problem) -> None:
    model = interacting_model(problem)
    other = replace(problem, loss=np.random.default_rng(0).random(problem.loss.shape))
    choices = [
        SOLVERS.get("evolutionary_scratch")(
            replace(p, oracle=oracle(model, 5_000)), budget(p)
        ).choice
        for p in (problem, other)
    ]
    assert (choices[0] == choices[1]).all()


def test_the_search_ends_when_every_plan_is_known() -> None:
    small = synthetic_problem(2, 2, seed=0)
    model = interacting_model(small)
    asked = oracle(model, 10**12)
    max_bytes = int(small.bytes.max(axis=1).sum()) - 1
    evolutionary(replace(small, oracle=asked), max_bytes)
    assert asked.tokens <= 4 * SEQUENCES * LENGTH


def test_an_overflowing_model_never_wins(problem: Problem) -> None:
    model = interacting_model(problem)

    def overflowing(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        kl = model(choices, sequences)
        kl[np.array(choices)[:, 0] == 0] = np.nan
        return kl

    asked = oracle(overflowing, 10_000)
    choice = SOLVERS.get("evolutionary_scratch")(
        replace(problem, oracle=asked), budget(problem)
    ).choice
    assert choice[0] != 0


@pytest.mark.parametrize("name", [*NAMES, "tpe", "nsga2"])
def test_constraints_besides_bytes_are_refused(problem: Problem, name: str) -> None:
    limited = replace(problem, constraints=(Constraint("latency", problem.loss, 1.0),))
    with pytest.raises(ValueError, match="also limits latency"):
        SOLVERS.get(name)(limited, budget(problem))

"""Random tables with times: the fastest plan of a quality, and plans within a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitplan.kernels.latency import Device, names
from bitplan.search.fastest import by_time, fastest
from bitplan.search.limits import Limits, build_problem
from bitplan.search.problem import Constraint, Problem
from bitplan.search.solvers import SOLVERS
from bitplan.tests.property.test_limits import random_table

SEEDS = st.integers(0, 2**32 - 1)
NS = 10**6  # nanoseconds in a millisecond


def random_problem(generator: np.random.Generator) -> tuple[Problem, NDArray[np.float64]]:
    """Up to five units x four formats; times in whole nanoseconds, not in the order of bytes."""
    shape = (int(generator.integers(1, 6)), 4)
    loss = generator.lognormal(-2, 1.5, shape)
    loss[generator.random(shape) < 0.15] = np.inf
    loss[:, -1] = generator.lognormal(-4, 1, shape[0])
    size = generator.integers(1, 400, shape)
    time = generator.integers(1, 300, shape) / NS
    units = tuple(f"u{i}" for i in range(shape[0]))
    return Problem(units, ("a", "b", "c", "d"), size, loss), time


def choices(problem: Problem) -> list[NDArray[np.intp]]:
    return [np.array(c) for c in product(*(np.flatnonzero(row) for row in problem.allowed))]


def total(values: NDArray[Any], choice: NDArray[np.intp]) -> float:
    return float(values[np.arange(len(choice)), choice].sum())


def nanoseconds(time: NDArray[np.float64], choice: NDArray[np.intp]) -> int:
    return round(NS * total(time, choice))


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_no_plan_of_the_quality_is_faster_and_none_as_fast_is_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    problem, time = random_problem(generator)
    everything = choices(problem)
    target = total(problem.loss, everything[int(generator.integers(len(everything)))])
    target *= float(generator.uniform(1, 1.2))
    size = int(np.quantile([total(problem.bytes, c) for c in everything], generator.uniform(0, 1)))
    cost = generator.random(problem.bytes.shape)
    limit = Constraint("heat", cost, float(cost.max(axis=1).sum() * generator.uniform(0.4, 1)))
    limited = bool(generator.integers(2))
    if limited:
        problem = replace(problem, constraints=(limit,))
    max_bytes = size if generator.integers(2) else 10**9
    fitting = [
        c
        for c in everything
        if total(problem.loss, c) <= target
        and total(problem.bytes, c) <= max_bytes
        and not (limited and total(cost, c) > limit.limit)
    ]
    if not fitting:
        with pytest.raises(
            ValueError, match=r"needs|No plan has a predicted KL|below the smallest"
        ):
            fastest(problem, max_bytes, time, target)
        return
    solution = fastest(problem, max_bytes, time, target)
    least = min(nanoseconds(time, c) for c in fitting)
    best = min(total(problem.loss, c) for c in fitting if nanoseconds(time, c) == least)
    assert nanoseconds(time, solution.choice) == least
    assert solution.loss == pytest.approx(best, rel=1e-4)
    assert solution.loss <= target * (1 + 1e-9)
    assert solution.bytes == total(problem.bytes, solution.choice) <= max_bytes
    assert not limited or total(cost, solution.choice) <= limit.limit * (1 + 1e-9)
    assert solution.lower_bound <= best * (1 + 1e-9)
    stated = float(solution.note.split("less than ")[1].split(" ms")[0])
    assert stated * NS <= least * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(names()), st.integers(1, 300))
def test_a_plan_keeps_its_time_exactly_and_none_is_better(
    seed: int, name: str, tokens: int
) -> None:
    generator = np.random.default_rng(seed)
    table = random_table(generator)
    device = Device.load(name)
    free = Limits(device=device, tokens=tokens)
    problem = build_problem(table, free)
    assert problem.constraints == ()
    time = free.milliseconds(table, problem.allowed)
    assert NS * time == pytest.approx(np.round(NS * time), abs=1e-6)
    everything = choices(problem)
    times = [nanoseconds(time, c) for c in everything]
    max_ns = times[int(generator.integers(len(times)))] - int(generator.integers(2))
    limits = Limits(device=device, tokens=tokens, max_ms=max_ns / NS)
    within = [c for c, ns in zip(everything, times, strict=True) if ns <= max_ns]
    problem = build_problem(table, limits)
    if not within:
        with pytest.raises(
            ValueError, match="cannot hold: every choice needs latency >= "
        ) as error:
            SOLVERS.get("certified")(problem, 10**9)
        needs = float(str(error.value).split("latency to ")[1].split(" ms")[0].replace(",", ""))
        assert max_ns < min(times) <= needs * NS * (1 + 1e-9) <= min(times) * 1.01 + 1
        return
    solution = SOLVERS.get("certified")(problem, 10**9)
    assert nanoseconds(time, solution.choice) <= max_ns
    best = min(total(problem.loss, c) for c in within)
    assert solution.loss == pytest.approx(best, rel=1e-4)
    told = limits.latency_of(table, solution.choice)
    assert told is not None
    assert round(NS * told.ms) == nanoseconds(time, solution.choice)
    assert (told.max_ms, told.tokens, told.device) == (max_ns / NS, tokens, device.title)


def test_by_time_puts_whole_nanoseconds_for_bytes() -> None:
    problem, time = random_problem(np.random.default_rng(3))
    timed = by_time(problem, time)
    allowed = problem.allowed
    assert (timed.bytes[allowed] == np.round(NS * time[allowed])).all()
    assert timed.loss is problem.loss

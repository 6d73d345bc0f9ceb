"""Shadow prices against what they mean: how the best loss moves with a limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitplan.search.hull import lower_hull
from bitplan.search.problem import Constraint, Problem
from bitplan.search.program import Program
from bitplan.search.shadow import shadow_prices
from bitplan.tests.fakes import fake_table, transformer_units


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.from_table(fake_table(transformer_units(3)))


def budget(problem: Problem, bpw: float = 4.3) -> int:
    return int(bpw * problem.weights / 8)


def relaxed(problem: Problem, max_bytes: int) -> float:
    answer = Program.build(problem, max_bytes).minimize(problem.loss, whole=False)
    assert answer is not None
    return answer.bound


def test_the_price_of_a_byte_is_the_slope_of_the_bound(problem: Problem) -> None:
    size, hull = budget(problem), lower_hull(problem)
    price = shadow_prices(problem, size)
    gained = hull.relax(problem, size).bound - hull.relax(problem, size + 1).bound
    assert price.per_byte == pytest.approx(gained, rel=1e-3)
    assert price.per_byte > 0
    assert price.per_limit == ()


def test_bytes_are_free_above_the_largest_plan(problem: Problem) -> None:
    assert shadow_prices(problem, budget(problem, 40)).per_byte == 0.0


def test_prices_of_two_limits_are_slopes_of_the_relaxation(problem: Problem) -> None:
    random = np.random.default_rng(0)
    cost = problem.bytes * random.uniform(0.5, 2, (len(problem.units), 1)) / 1e6
    size = budget(problem)
    free = lower_hull(problem).relax(problem, size).choice
    limit = 0.97 * float(cost[np.arange(len(free)), free].sum())
    both = replace(problem, constraints=(Constraint("time", cost, limit, "ms"),))
    prices = shadow_prices(both, size)
    base, more_bytes, more_time = (
        relaxed(both, size),
        relaxed(both, size + 2_000),
        relaxed(replace(both, constraints=(Constraint("time", cost, 1.001 * limit),)), size),
    )
    assert prices.per_byte * 2_000 == pytest.approx(base - more_bytes, rel=0.05, abs=1e-9)
    assert prices.per_limit[0] * 0.001 * limit == pytest.approx(base - more_time, rel=0.05)
    assert prices.per_limit[0] > 0


def test_a_limit_with_room_has_no_price(problem: Problem) -> None:
    cost = problem.bytes.astype(np.float64)
    loose = replace(problem, constraints=(Constraint("time", cost, 1e12),))
    prices = shadow_prices(loose, budget(problem))
    assert prices.per_limit == (0.0,)
    assert prices.per_byte == pytest.approx(shadow_prices(problem, budget(problem)).per_byte)


def test_limits_that_exclude_each_other_have_no_price(problem: Problem) -> None:
    cost = np.ones(problem.loss.shape)
    closed = replace(problem, constraints=(Constraint("time", cost, 0.5),))
    with pytest.raises(ValueError, match="No plan is within all limits"):
        shadow_prices(closed, budget(problem))

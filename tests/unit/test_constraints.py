"""Several limits at once: HiGHS and PuLP against brute force, and why a set is infeasible."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitplan.search.conflicts import explain_infeasible
from bitplan.search.problem import Constraint, Problem
from bitplan.search.solvers import SOLVERS
from bitplan.search.solvers.ilp import write_ilp
from bitplan.testing.problems import synthetic_problem

SEEDS = st.integers(0, 2**32 - 1)


def limited_problem(seed: int) -> tuple[Problem, int]:
    """Up to 5 units x 4 formats with two further constraints, within reach or not."""
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers((2, 2), (6, 5)))
    size = generator.integers(0, generator.choice([20, 10**7]), shape)
    loss = generator.lognormal(0, 1, shape) - generator.choice([0.0, 1.0])
    loss[generator.random(shape) < 0.1] = np.inf
    loss[:, 0] = 3.0
    costs = (generator.random(shape), 1e6 * generator.lognormal(0, 1, shape))
    shares = generator.uniform(-0.05, 0.8, 3)

    def between(cost: NDArray[np.generic], share: float) -> float:
        least, most = cost.min(axis=1).sum(), cost.max(axis=1).sum()
        return float(least + share * (most - least))

    problem = Problem(
        tuple(f"u{u}" for u in range(shape[0])),
        tuple(f"f{f}" for f in range(shape[1])),
        size,
        loss,
        constraints=(
            Constraint("latency", costs[0], between(costs[0], shares[1]), "ms"),
            Constraint("BOPs", costs[1], between(costs[1], shares[2])),
        ),
    )
    return problem, max(int(between(size, shares[0])), int(problem.smallest_bytes().sum()))


def feasible_losses(problem: Problem, max_bytes: int) -> NDArray[np.float64]:
    """The loss of every choice within all limits."""
    plans = np.array(list(itertools.product(*(np.flatnonzero(row) for row in problem.allowed))))
    rows = np.arange(plans.shape[1])
    within = problem.bytes[rows, plans].sum(axis=1) <= max_bytes
    for constraint in problem.constraints:
        within &= constraint.cost[rows, plans].sum(axis=1) <= constraint.limit
    losses: NDArray[np.float64] = problem.loss[rows, plans].sum(axis=1)[within]
    return losses


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_highs_finds_the_best_choice_within_all_limits(seed: int) -> None:
    problem, max_bytes = limited_problem(seed)
    losses = feasible_losses(problem, max_bytes)
    if not len(losses):
        with pytest.raises(ValueError, match="cannot"):
            SOLVERS.get("highs")(problem, max_bytes)
        return
    best = losses.min()
    solution = SOLVERS.get("highs")(problem, max_bytes)
    spread = np.ptp(problem.loss[problem.allowed])
    assert solution.loss == pytest.approx(best, rel=2e-5, abs=1e-7 * spread)
    assert solution.lower_bound <= best + 1e-9 * max(spread, abs(best))
    assert solution.bytes <= max_bytes
    rows = np.arange(len(problem.units))
    for constraint in problem.constraints:
        assert constraint.cost[rows, solution.choice].sum() <= constraint.limit * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(SEEDS)
@example(2949839255)  # CBC's preprocessing loses the optimum
def test_pulp_agrees_with_brute_force(seed: int) -> None:
    problem, max_bytes = limited_problem(seed)
    losses = feasible_losses(problem, max_bytes)
    if not len(losses):
        with pytest.raises(ValueError, match="cannot"):
            SOLVERS.get("ilp")(problem, max_bytes)
        return
    spread = np.ptp(problem.loss[problem.allowed])
    solution = SOLVERS.get("ilp")(problem, max_bytes)
    assert solution.loss == pytest.approx(losses.min(), rel=1e-6, abs=1e-7 * spread)


@pytest.mark.parametrize("bpw", [2.6, 3.3, 4.3])
def test_highs_without_constraints_equals_certified(bpw: float) -> None:
    problem = synthetic_problem(60, 8, seed=1)
    max_bytes = int(bpw * problem.weights / 8)
    solution = SOLVERS.get("highs")(problem, max_bytes)
    certified = SOLVERS.get("certified")(problem, max_bytes)
    assert solution.bytes <= max_bytes
    assert solution.loss == pytest.approx(certified.loss, rel=1e-5)
    assert solution.lower_bound <= certified.loss * (1 + 1e-9)
    assert solution.gap <= 1.1e-5


def test_certified_hands_constraints_to_highs() -> None:
    problem, max_bytes = two_limits()
    found, same = (SOLVERS.get(name)(problem, max_bytes) for name in ("certified", "highs"))
    assert (found.choice == same.choice).all()
    free = SOLVERS.get("certified")(replace(problem, constraints=()), max_bytes)
    assert found.loss > free.loss


def two_limits() -> tuple[Problem, int]:
    problem = synthetic_problem(40, 8, seed=2)
    max_bytes = int(3.3 * problem.weights / 8)
    cost = np.random.default_rng(0).random(problem.bytes.shape)
    free = SOLVERS.get("certified")(problem, max_bytes).choice
    least = cost.min(axis=1).sum()
    limit = least + 0.6 * (cost[np.arange(40), free].sum() - least)
    return replace(
        problem, constraints=(Constraint("latency", cost, float(limit), "ms"),)
    ), max_bytes


def test_an_exact_fit_is_kept_and_one_byte_less_is_not() -> None:
    """Large coefficients: a tolerance of a millionth of a unit's bytes is many bytes."""
    generator = np.random.default_rng(0)
    size = generator.integers(10**9, 10**10, (12, 4))
    loss = -size / 1e9 + generator.random((12, 4))
    problem = Problem(tuple("abcdefghijkl"), tuple("wxyz"), size, loss)
    best = problem.evaluate(problem.best_choice(), np.inf)
    highs = SOLVERS.get("highs")
    assert (highs(problem, best.bytes).choice == best.choice).all()
    less = highs(problem, best.bytes - 1)
    assert less.bytes <= best.bytes - 1
    expected = SOLVERS.get("certified")(problem, best.bytes - 1)
    assert less.loss == pytest.approx(expected.loss, rel=1e-5)


def test_written_programs_include_the_constraints(tmp_path: Path) -> None:
    problem, max_bytes = two_limits()
    for suffix in (".lp", ".mps"):
        write_ilp(problem, max_bytes, tmp_path / f"plan{suffix}")
        assert "limit_0" in (tmp_path / f"plan{suffix}").read_text()


def test_an_infinite_cost_closes_the_option() -> None:
    problem, max_bytes = two_limits()
    cost = problem.constraints[0].cost.copy()
    best = SOLVERS.get("highs")(problem, max_bytes).choice
    cost[0, best[0]] = np.inf
    closed = replace(problem, constraints=(replace(problem.constraints[0], cost=cost),))
    for name in ("highs", "ilp"):
        assert SOLVERS.get(name)(closed, max_bytes).choice[0] != best[0]
    cost[0] = np.inf
    with pytest.raises(ValueError, match=r"Unit 'unit0' has no allowed format .* 'latency'"):
        SOLVERS.get("highs")(closed, max_bytes)


def test_a_cost_of_another_shape_is_refused() -> None:
    problem, max_bytes = two_limits()
    wrong = Constraint("latency", np.ones((40, 7)), 1.0)
    with pytest.raises(ValueError, match=r"'latency' has shape \(40, 7\), expected \(40, 8\)"):
        SOLVERS.get("highs")(replace(problem, constraints=(wrong,)), max_bytes)


def test_other_solvers_name_the_constraint_and_who_obeys_it() -> None:
    problem, max_bytes = two_limits()
    with pytest.raises(ValueError, match=r"'greedy' solver.*\(latency\).*such as 'certified'"):
        SOLVERS.get("greedy")(problem, max_bytes)


def pair(*limits: tuple[str, list[list[float]], float, str]) -> Problem:
    """Two units: 10 B and 1 nat, or 30 B and none, each."""
    constraints = tuple(Constraint(n, np.array(c), limit, s) for n, c, limit, s in limits)
    size, loss = np.array([[10, 30]] * 2), np.array([[1.0, 0.0]] * 2)
    return Problem(("a", "b"), ("low", "high"), size, loss, constraints=constraints)


SLOW_WHEN_SMALL = [[2.0, 1.0], [2.5, 1.0]]


def test_two_limits_in_conflict_are_named_with_what_each_needs() -> None:
    problem = pair(("latency", SLOW_WHEN_SMALL, 3.0, "ms"), ("BOPs", [[1.0, 1.0]] * 2, 9.0, ""))
    assert explain_infeasible(problem, 39) == (
        "bytes <= 39 B and latency <= 3 ms cannot both hold: latency <= 3 ms needs bytes >= 40 B; "
        "bytes <= 39 B needs latency >= 4.500 ms. "
        "Raise bytes to 40 B (--budget 40B) or latency to 4.500 ms."
    )
    with pytest.raises(ValueError, match=r"bytes <= 39 B and latency <= 3 ms cannot both hold"):
        SOLVERS.get("highs")(problem, 39)
    with pytest.raises(ValueError, match=r"bytes <= 39 B and latency <= 3 ms cannot both hold"):
        SOLVERS.get("ilp")(problem, 39)


def test_one_impossible_limit_is_named_alone() -> None:
    problem = pair(("latency", SLOW_WHEN_SMALL, 1.5, "ms"))
    assert explain_infeasible(problem, 1000) == (
        "latency <= 1.5 ms cannot hold: every choice needs latency >= 2.000 ms. "
        "Raise latency to 2.000 ms."
    )


def test_separate_conflicts_are_solved_together() -> None:
    problem = pair(("latency", SLOW_WHEN_SMALL, 1.5, "ms"), ("energy", [[3.0, 3.0]] * 2, 5.0, "mJ"))
    text = explain_infeasible(problem, 1000)
    assert "There are further conflicts; raise latency to 2.000 ms and energy to 6.000 mJ" in text


def test_three_limits_that_conflict_only_together() -> None:
    """Each of three units must take one of three formats, each limited to none of its own."""
    cost = np.eye(3)
    constraints = tuple(
        Constraint(name, np.tile(cost[f], (1, 1)), 0.0) for f, name in enumerate("xyz")
    )
    problem = Problem(("u",), ("f", "g", "h"), np.ones((1, 3), dtype=np.int64), np.ones((1, 3)))
    text = explain_infeasible(replace(problem, constraints=constraints), 5)
    assert text.startswith("x <= 0, y <= 0 and z <= 0 cannot all hold")
    assert "Raise x to 1.000, y to 1.000 or z to 1.000." in text


def test_limits_that_can_hold_are_said_to() -> None:
    problem = pair(("latency", SLOW_WHEN_SMALL, 3.0, "ms"))
    assert explain_infeasible(problem, 40) == "All limits can hold together."


def raised(problem: Problem, max_bytes: int, advice: str) -> tuple[Problem, int]:
    for name, value in re.findall(r"(\w+) to ([\d,.]*\d)", advice):
        number = float(value.replace(",", ""))
        if name == "bytes":
            max_bytes = int(number)
        problem = replace(
            problem,
            constraints=tuple(
                replace(c, limit=number) if c.name == name else c for c in problem.constraints
            ),
        )
    return problem, max_bytes


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_every_suggested_raise_makes_it_feasible(seed: int) -> None:
    problem, max_bytes = limited_problem(seed)
    assume(not len(feasible_losses(problem, max_bytes)))
    text = explain_infeasible(problem, max_bytes)
    stated, advice = re.split(r"(?<=\.) (?:Raise|There are further conflicts; raise) ", text)
    suggestions = (
        [advice] if advice.endswith("together.") else re.split(r", (?=[a-zA-Z])| or ", advice)
    )
    for suggestion in suggestions:
        assert len(feasible_losses(*raised(problem, max_bytes, suggestion)))
    # The conflict is one, and none of its limits can be left out.
    names = re.findall(r"(\w+) <=", stated.split(" cannot ")[0])
    huge = 10**12

    def only(kept: list[str]) -> int:
        loose = replace(
            problem,
            constraints=tuple(
                c if c.name in kept else replace(c, limit=huge) for c in problem.constraints
            ),
        )
        return len(feasible_losses(loose, max_bytes if "bytes" in kept else huge))

    assert not only(names)
    assert all(only([n for n in names if n != left_out]) for left_out in names)


def test_raises_name_the_option_that_sets_the_limit() -> None:
    problem = pair(("latency", SLOW_WHEN_SMALL, 3.0, "ms"))
    limit = replace(problem.constraints[0], option="--max-ms")
    problem = replace(problem, constraints=(limit,))
    assert explain_infeasible(problem, 39).endswith(
        "Raise bytes to 40 B (--budget 40B) or latency to 4.500 ms (--max-ms 4.500)."
    )
    shared = replace(problem, bytes_option="")  # a memory that holds more than these bytes
    assert "Raise bytes to 40 B or latency" in explain_infeasible(shared, 39)

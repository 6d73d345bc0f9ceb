"""The solvers against brute force on small random tables, and against CBC on realistic ones."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitplan.benchmarks import bench_solvers
from bitplan.search.frontier import Frontier
from bitplan.search.problem import Problem
from bitplan.search.solvers import SOLVERS
from bitplan.search.solvers.ilp import write_ilp
from bitplan.testing.problems import synthetic_problem

certified = SOLVERS.get("certified")
ilp = SOLVERS.get("ilp")

SEEDS = st.integers(0, 2**32 - 1)


def random_problem(seed: int) -> Problem:
    """Up to 6 units x 4 formats, with ties, closed entries, duplicate and dominated options.

    The numbers come from numpy, not from hypothesis, whose small and repeated numbers make tables
    that the greedy plan already solves.
    """
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(1, (7, 5)))
    size = generator.integers(0, generator.choice([4, 40, 1000, 10**9]), shape)
    draws = (
        generator.integers(0, 4, shape).astype(float),  # ties and zeros
        generator.integers(-50, 50, shape).astype(float),  # changes around a current plan
        generator.random(shape),
        generator.lognormal(0, 4, shape),  # many decades
        1e3 - size / size.max(initial=1) * generator.uniform(0.9, 1, shape),  # falls with bytes
    )
    loss = draws[generator.integers(len(draws))]
    if generator.random() < 0.2:
        size[:, 0], loss[:, 0] = size[:, -1], loss[:, -1]
    closed = generator.random(shape) < 0.15
    closed[:, generator.integers(shape[1])] = False
    loss[closed] = np.inf
    units, formats = (
        tuple(f"{kind}{i}" for i in range(n)) for kind, n in zip("uf", shape, strict=True)
    )
    return Problem(units, formats, size, loss, weights=100)


@st.composite
def problems_with_budget(draw: st.DrawFn) -> tuple[Problem, int]:
    """A problem and a feasible budget, at times exactly the smallest plan or above the largest."""
    seed = draw(SEEDS)
    problem = random_problem(seed)
    least = int(problem.smallest_bytes().sum())
    most = int(problem.bytes.max(axis=1).sum())
    inside = int(np.random.default_rng(seed).integers(least, most + 1))
    return problem, draw(st.sampled_from([inside, inside, inside, inside, least, most + 1]))


def all_plans(problem: Problem) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Bytes and loss of every choice."""
    size, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    for unit_bytes, unit_loss in zip(problem.bytes, problem.loss, strict=True):
        size = (size[:, None] + unit_bytes).ravel()
        loss = (loss[:, None] + unit_loss).ravel()
    return size, loss


def optimum(problem: Problem, max_bytes: int) -> float:
    size, loss = all_plans(problem)
    return float(loss[size <= max_bytes].min())


def close(loss: float) -> object:
    return pytest.approx(loss, rel=1e-12, abs=1e-13)


@settings(max_examples=1000, deadline=None)
@given(problems_with_budget())
def test_certified_finds_and_proves_the_optimum(case: tuple[Problem, int]) -> None:
    problem, max_bytes = case
    solution = certified(problem, max_bytes)
    assert solution.bytes <= max_bytes
    assert solution.loss == close(optimum(problem, max_bytes))
    assert solution.lower_bound == solution.loss


@settings(max_examples=500, deadline=None)
@given(problems_with_budget(), st.integers(1, 3), st.integers(1, 60))
def test_certified_stays_honest_when_it_must_drop_states(
    case: tuple[Problem, int], states: int, work: int
) -> None:
    problem, max_bytes = case
    module = import_module("bitplan.search.solvers.certified")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_STATES", states)
        patch.setattr(module, "MAX_WORK", work)
        solution = certified(problem, max_bytes)
    best = optimum(problem, max_bytes)
    assert solution.bytes <= max_bytes
    assert solution.lower_bound <= best + 1e-12 * max(1.0, abs(best))
    assert solution.loss >= best - 1e-12 * max(1.0, abs(best))


@settings(max_examples=25, deadline=None)
@given(problems_with_budget())
def test_cbc_agrees_with_brute_force(case: tuple[Problem, int]) -> None:
    problem, max_bytes = case
    best = optimum(problem, max_bytes)
    spread = np.ptp(problem.loss[problem.allowed])
    assert ilp(problem, max_bytes).loss == pytest.approx(best, rel=1e-6, abs=1e-9 * spread)


@settings(max_examples=500, deadline=None)
@given(problems_with_budget())
def test_frontier_bounds_every_plan(case: tuple[Problem, int]) -> None:
    problem, max_bytes = case
    frontier = Frontier.from_problem(problem)
    best = optimum(problem, max_bytes)
    scale = np.abs(frontier.predicted_kl).max()
    assert frontier.lower_bound(max_bytes) <= best + 1e-12 * scale
    plan = problem.evaluate(frontier.at(max_bytes), np.inf)
    assert plan.bytes <= max_bytes
    assert plan.loss >= best - 1e-12 * scale


@settings(max_examples=100, deadline=None)
@given(SEEDS.map(random_problem))
def test_every_frontier_plan_is_optimal_for_its_bytes(problem: Problem) -> None:
    frontier = Frontier.from_problem(problem)
    scale = np.abs(frontier.predicted_kl).max()
    for size, kl in zip(*frontier.points(), strict=True):
        assert kl == pytest.approx(optimum(problem, int(size)), rel=1e-12, abs=1e-12 * scale)


@settings(max_examples=50, deadline=None)
@given(SEEDS.map(random_problem))
def test_loss_never_rises_with_the_budget(problem: Problem) -> None:
    least, most = int(problem.smallest_bytes().sum()), int(problem.bytes.max(axis=1).sum())
    losses = [
        certified(problem, int(b)).loss for b in np.linspace(least, most + 1, 6, dtype=np.int64)
    ]
    assert all(b <= a + 1e-12 * max(1.0, abs(a)) for a, b in pairwise(losses))


@pytest.mark.parametrize("bpw", [2.6, 3.28, 4.3, 6.0])
def test_certified_equals_cbc_on_a_realistic_table(bpw: float) -> None:
    problem = synthetic_problem(210, 12, seed=7)
    max_bytes = int(bpw * problem.weights / 8)
    solution = certified(problem, max_bytes)
    assert solution.gap == 0
    assert solution.loss == pytest.approx(ilp(problem, max_bytes).loss, rel=1e-6)


@pytest.mark.parametrize("less", [0, 1])
def test_cbc_copes_with_a_budget_at_the_best_plan(less: int) -> None:
    problem = synthetic_problem(20, 8, seed=11)
    best = problem.evaluate(problem.best_choice(), np.inf)
    expected = certified(problem, best.bytes - less).loss
    assert ilp(problem, best.bytes - less).loss == pytest.approx(expected, rel=1e-6)


def test_certified_on_equal_units_is_bounded_in_work_and_honest() -> None:
    one = synthetic_problem(1, 12, seed=8)
    count = 3000
    problem = Problem(
        tuple(f"u{u}" for u in range(count)),
        one.formats,
        np.repeat(one.bytes, count, axis=0),
        np.repeat(one.loss, count, axis=0),
        weights=count * one.weights,
    )
    max_bytes = int(3.3 * problem.weights / 8)
    solution = certified(problem, max_bytes)
    assert solution.bytes <= max_bytes
    assert Frontier.from_problem(problem).lower_bound(max_bytes) <= solution.lower_bound * (
        1 + 1e-9
    )
    assert solution.gap < 1e-4


def test_written_programs_name_the_same_problem(tmp_path: Path) -> None:
    problem = synthetic_problem(5, 4, seed=9)
    max_bytes = int(3.0 * problem.weights / 8)
    for suffix in (".lp", ".mps"):
        write_ilp(problem, max_bytes, tmp_path / f"plan{suffix}")
        assert "x_4_3" in (tmp_path / f"plan{suffix}").read_text()
    with pytest.raises(ValueError, match=r"end it in \.lp or \.mps"):
        write_ilp(problem, max_bytes, tmp_path / "plan.txt")


def test_quick_benchmark_writes_both_files(tmp_path: Path) -> None:
    script = str(bench_solvers.__file__)
    subprocess.run(
        [sys.executable, script, "--quick", "--out", str(tmp_path)], check=True, capture_output=True
    )
    result = json.loads((tmp_path / "solvers.json").read_text())
    assert {row["gap"] for row in result["rows"]} == {0.0}
    assert result["figures"]["largest_difference_from_cbc"] < 1e-6
    assert "| units | formats |" in (tmp_path / "solvers.md").read_text()

"""The solvers of the literature against their formulas and against brute force."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitplan.search.hull import lower_hull
from bitplan.search.problem import Problem
from bitplan.search.solvers import SOLVERS
from bitplan.search.solvers.baq import water_fill
from bitplan.search.solvers.interaction import shrinkage
from bitplan.testing.problems import synthetic_problem

SEEDS = st.integers(0, 2**32 - 1)
NAMES = ["baq", "dp", "greedy", "hawq_v2", "interaction", "random", "shuffled"]


def random_problem(seed: int) -> Problem:
    """Up to 5 units x 4 formats, with ties, closed entries and dominated options."""
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(1, (6, 5)))
    size = generator.integers(1, generator.choice([5, 50, 10**6]), shape)
    draws = (
        generator.integers(-3, 4, shape).astype(float),
        generator.random(shape),
        generator.lognormal(0, 3, shape),
    )
    loss = draws[generator.integers(len(draws))]
    closed = generator.random(shape) < 0.15
    closed[:, generator.integers(shape[1])] = False
    loss[closed] = np.inf
    return Problem(
        tuple(f"u{u}" for u in range(shape[0])),
        tuple(f"f{f}" for f in range(shape[1])),
        size,
        loss,
        weights=100,
        unit_weights=generator.integers(1, 20, shape[0]),
        kinds=tuple(generator.choice(["a", "b"], shape[0]).tolist()),
        scores=generator.standard_normal((8, *shape)).astype(np.float32),
    )


def budget(problem: Problem, seed: int) -> int:
    least, most = int(problem.smallest_bytes().sum()), int(problem.bytes.max(axis=1).sum())
    return int(np.random.default_rng(seed).integers(least, most + 2))


def choices(problem: Problem) -> NDArray[np.intp]:
    """All plans, [P, U]."""
    options = (np.flatnonzero(row) for row in problem.allowed)
    return np.array(list(itertools.product(*options)))


def totals(values: NDArray[np.generic], plans: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sum over units of every plan, [P]."""
    total: NDArray[np.float64] = values[np.arange(plans.shape[1]), plans].sum(axis=1)
    return total


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.sampled_from(NAMES))
def test_every_plan_is_allowed_fits_and_is_not_below_its_bound(seed: int, name: str) -> None:
    problem = random_problem(seed)
    max_bytes = budget(problem, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        solution = SOLVERS.get(name)(problem, max_bytes, seed=seed)
        again = SOLVERS.get(name)(problem, max_bytes, seed=seed)
    assert (solution.choice == again.choice).all()
    rows = np.arange(len(problem.units))
    assert problem.allowed[rows, solution.choice].all()
    assert solution.bytes == problem.bytes[rows, solution.choice].sum() <= max_bytes
    plans = choices(problem)
    losses = totals(problem.loss, plans)[totals(problem.bytes, plans) <= max_bytes]
    assert solution.lower_bound <= losses.min() + 1e-9 * max(1.0, abs(losses.min()))


@settings(max_examples=200, deadline=None)
@given(SEEDS, st.sampled_from([1, 3, 10_000]))
def test_dp_is_exact_or_honest(seed: int, states: int) -> None:
    problem = random_problem(seed)
    max_bytes = budget(problem, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("bitplan.search.solvers.dp"), "MAX_STATES", states)
        solution = SOLVERS.get("dp")(problem, max_bytes)
    plans = choices(problem)
    best = totals(problem.loss, plans)[totals(problem.bytes, plans) <= max_bytes].min()
    close = pytest.approx(best, rel=1e-12, abs=1e-12)
    if states > 3:
        assert solution.gap == 0
    assert solution.lower_bound <= best + 1e-12 * max(1.0, abs(best))
    if solution.gap == 0:
        assert solution.loss == close


def test_dp_agrees_with_certified_where_states_must_be_pruned() -> None:
    problem = synthetic_problem(60, 8, seed=3)
    max_bytes = int(3.3 * problem.weights / 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("bitplan.search.solvers.dp"), "MAX_STATES", 300)
        solution = SOLVERS.get("dp")(problem, max_bytes)
    assert solution.gap == 0
    assert solution.loss == pytest.approx(SOLVERS.get("certified")(problem, max_bytes).loss)


def greedy_by_hand(problem: Problem, max_bytes: int) -> float:
    """Take the best step that fits, one at a time, trying all units every time."""
    ladders = []
    for u in range(len(problem.units)):
        ladder: list[int] = []
        options = np.flatnonzero(problem.allowed[u])
        for f in sorted(options, key=lambda f: (problem.bytes[u, f], problem.loss[u, f], f)):
            if not ladder or problem.loss[u, f] < problem.loss[u, ladder[-1]]:
                ladder.append(int(f))
        ladders.append(ladder)
    level = [0] * len(ladders)

    def step(u: int) -> tuple[int, float]:
        below, above = ladders[u][level[u]], ladders[u][level[u] + 1]
        return (
            int(problem.bytes[u, above] - problem.bytes[u, below]),
            float(problem.loss[u, below] - problem.loss[u, above]),
        )

    slack = max_bytes - sum(int(problem.bytes[u, ladder[0]]) for u, ladder in enumerate(ladders))
    while True:
        open_ = [u for u, ladder in enumerate(ladders) if level[u] + 1 < len(ladder)]
        fitting = [u for u in open_ if step(u)[0] <= slack]
        if not fitting:
            return sum(float(problem.loss[u, ladders[u][k]]) for u, k in enumerate(level))
        best = max(fitting, key=lambda u: step(u)[1] / step(u)[0])
        slack -= step(best)[0]
        level[best] += 1


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_greedy_takes_the_best_step_that_fits(seed: int) -> None:
    problem = random_problem(seed)
    generator = np.random.default_rng(seed)
    # without ties, which either may break
    problem = replace(problem, loss=problem.loss + generator.random(problem.loss.shape))
    max_bytes = budget(problem, seed)
    solution = SOLVERS.get("greedy")(problem, max_bytes)
    assert solution.loss == pytest.approx(greedy_by_hand(problem, max_bytes))


def test_greedy_is_hidden_a_good_step_behind_a_poor_one() -> None:
    problem = Problem(
        ("a", "b"),
        ("low", "mid", "high"),
        np.array([[10, 20, 30], [10, 20, 30]]),
        np.array([[5.0, 4.9, 0.0], [1.0, 0.5, 0.45]]),
    )
    assert SOLVERS.get("greedy")(problem, 40).choice.tolist() == [1, 1]
    assert SOLVERS.get("certified")(problem, 40).choice.tolist() == [2, 0]


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_hawq_v2_is_the_best_plan_in_order_of_sensitivity(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 6))
    weights = generator.integers(1, 9, count)
    # Formats of exactly 1, 2 and 4 bits per weight; losses exactly c 4^-b.
    bits = np.array([1, 2, 4])
    level = generator.permutation(np.arange(1, count + 1)) * 10.0
    problem = Problem(
        tuple(f"u{u}" for u in range(count)),
        ("one", "two", "four"),
        weights[:, None] * bits,
        (level * weights)[:, None] * 4.0**-bits,
        unit_weights=8 * weights,
    )
    max_bytes = budget(problem, seed)
    plans = choices(problem)[:, np.argsort(-level)]
    plans = plans[(np.diff(plans, axis=1) <= 0).all(axis=1)][:, np.argsort(np.argsort(-level))]
    fits = totals(problem.bytes, plans) <= max_bytes
    solution = SOLVERS.get("hawq_v2")(problem, max_bytes)
    assert (np.diff(bits[solution.choice][np.argsort(-level)]) <= 0).all()
    assert solution.loss == pytest.approx(totals(problem.loss, plans)[fits].min())


def test_hawq_v2_leaves_pinned_units_out_and_falls_back_to_the_smallest_plan() -> None:
    inf = np.inf
    problem = Problem(
        ("pinned", "sensitive", "easy"),
        ("low", "high"),
        np.array([[10, 20], [10, 20], [10, 20]]),
        np.array([[inf, 0.1], [9.0, 1.0], [0.9, 0.1]]),
        unit_weights=np.array([40, 40, 40]),
    )
    assert SOLVERS.get("hawq_v2")(problem, 50).choice.tolist() == [1, 1, 0]
    # Only a wider format for the less sensitive unit: no order is left.
    closed = replace(
        problem,
        formats=("low", "mid", "high"),
        bytes=np.array([[10, 20, 30]] * 3),
        loss=np.array([[inf, inf, 0.1], [9.0, 2.0, inf], [inf, inf, 0.0]]),
    )
    closed = replace(closed, loss=np.array([[inf, inf, 0.1], [9.0, 2.0, inf], [inf, 0.2, 0.1]]))
    assert SOLVERS.get("hawq_v2")(closed, 60).choice.tolist() == [2, 0, 1]
    assert SOLVERS.get("hawq_v2")(closed, 80).choice.tolist() == [2, 1, 1]


def test_baq_meets_the_closed_form_where_nothing_is_clipped() -> None:
    coefficient, weights = np.array([8.0, 2.0, 0.5]), np.array([100, 200, 100])
    bits = np.array([0.5, 1, 2, 4, 8, 12])
    size = np.rint(weights[:, None] * bits / 8 * 100).astype(np.int64)
    problem = Problem(
        ("a", "b", "c"),
        tuple(f"f{f}" for f in range(6)),
        size,
        (coefficient * weights)[:, None] * 4.0**-bits,
        unit_weights=100 * weights,
    )
    target = water_fill(problem, 100 * weights, int(100 * weights.sum() * 4 / 8))
    found = 8 * target / (100 * weights)
    mean_log = (weights * np.log2(coefficient)).sum() / weights.sum()
    expected = 4 + (np.log2(coefficient) - mean_log) / 2  # Cover and Thomas, no unit at zero
    assert found == pytest.approx(expected, rel=1e-9)
    assert np.ptp(coefficient * 4.0**-found) == pytest.approx(0, abs=1e-9)  # equal loss per weight


def test_baq_clips_to_the_formats_and_rounds_down_within_the_bytes() -> None:
    problem = replace(synthetic_problem(40, 8, seed=5), unit_weights=None)
    weights = np.rint(problem.bytes[:, 0] * 8 / 2.125).astype(np.int64)
    problem = replace(problem, unit_weights=weights)
    for bpw in (2.2, 3.3, 5.0, 20.0):
        max_bytes = int(bpw * problem.weights / 8)
        target = water_fill(problem, weights, max_bytes)
        assert target.sum() <= max_bytes + 1e-3
        assert (target >= problem.smallest_bytes()).all()
        assert (target <= problem.bytes.max(axis=1)).all()
        solution = SOLVERS.get("baq")(problem, max_bytes)
        assert solution.bytes <= max_bytes
    assert solution.choice.tolist() == problem.best_choice().tolist()


@pytest.mark.parametrize("name", ["baq", "hawq_v2"])
def test_bits_per_weight_need_weights(name: str) -> None:
    problem = synthetic_problem(3, 4, seed=0)
    with pytest.raises(ValueError, match="needs the number of weights of every unit"):
        SOLVERS.get(name)(replace(problem, unit_weights=None), 10**9)


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_bisection_finds_the_fewest_bytes_of_the_target(seed: int) -> None:
    problem = random_problem(seed)
    max_bytes = budget(problem, seed)
    plans = choices(problem)
    size, loss = totals(problem.bytes, plans), totals(problem.loss, plans)
    target = float(np.random.default_rng(seed).choice(loss)) + 1e-9
    good = (loss <= target) & (size <= max_bytes)
    limited = replace(problem, max_loss=target)
    if not good.any():
        with pytest.raises(ValueError, match="the best one reaches"):
            SOLVERS.get("bisection")(limited, max_bytes)
        return
    solution = SOLVERS.get("bisection")(limited, max_bytes)
    assert solution.bytes == size[good].min()
    assert solution.loss == pytest.approx(loss[good & (size == solution.bytes)].min())
    assert solution.lower_bound <= solution.loss


def test_bisection_needs_a_target_and_notes_what_is_proven() -> None:
    problem = synthetic_problem(40, 8, seed=2)
    with pytest.raises(ValueError, match="give --max-kl"):
        SOLVERS.get("bisection")(problem, 10**12)
    solution = SOLVERS.get("bisection")(replace(problem, max_loss=0.5), 10**12)
    assert f"{solution.bytes:,} B" in solution.note
    assert SOLVERS.get("certified")(problem, solution.bytes - 1).loss > 0.5


def correlated_problem(seed: int, share: float) -> Problem:
    """Scores with a common factor of ``share`` of their variance, whose sign differs by unit."""
    generator = np.random.default_rng(seed)
    problem = synthetic_problem(6, 4, seed)
    sign = generator.choice([-1.0, 1.0], (1, 6, 1))
    common = generator.standard_normal((200, 1, 1)) * sign
    own = generator.standard_normal((200, 6, 1))
    mixed = np.sqrt(share) * common + np.sqrt(1 - share) * own
    scores = (mixed * np.sqrt(problem.loss)).astype(np.float32)
    loss = (scores.astype(np.float64) ** 2).mean(axis=0)
    return replace(problem, loss=loss, scores=scores)


def test_shrinkage_is_one_minus_noise_over_signal() -> None:
    chosen = np.random.default_rng(0).standard_normal((30, 5)) + 0.5
    products = chosen[:, :, None] * chosen[:, None, :]
    off = ~np.eye(5, dtype=bool)
    noise = (products.var(axis=0, ddof=1) / 30)[off].sum()
    signal = (products.mean(axis=0)[off] ** 2).sum()
    assert shrinkage(chosen) == pytest.approx(1 - noise / signal)
    assert shrinkage(np.ones((10, 4))) == pytest.approx(1)
    independent = np.random.default_rng(1).standard_normal((20, 200))
    assert shrinkage(independent) < 0.1
    assert shrinkage(np.zeros((10, 4))) == 0


@pytest.mark.parametrize("seed", range(4))
def test_interaction_comes_close_to_the_best_quadratic_plan(seed: int) -> None:
    problem = correlated_problem(seed, 0.7)
    scores = np.asarray(problem.scores, dtype=np.float64)
    max_bytes = int(3.0 * problem.weights / 8)
    plans = choices(problem)
    plans = plans[totals(problem.bytes, plans) <= max_bytes]
    rows = np.arange(6)
    separable = SOLVERS.get("certified")(problem, max_bytes)
    alpha = shrinkage(scores[:, rows, separable.choice])

    def objective(plan: NDArray[np.intp]) -> float:
        chosen = scores[:, rows, plan]
        cross = (chosen.sum(axis=1) ** 2).mean() - (chosen**2).mean(axis=0).sum()
        return float(problem.loss[rows, plan].sum() + alpha * cross)

    solution = SOLVERS.get("interaction")(problem, max_bytes)
    assert "help: held-out" in solution.note
    best = min(objective(plan) for plan in plans)
    before, after = objective(separable.choice), objective(solution.choice)
    assert after <= before
    assert after <= best + 0.1 * (before - best) + 1e-12
    assert solution.lower_bound == separable.lower_bound


def test_interaction_returns_the_separable_plan_when_units_are_independent() -> None:
    problem = correlated_problem(0, 0.0)
    max_bytes = int(3.0 * problem.weights / 8)
    with pytest.warns(UserWarning, match="do not help: held-out predicted loss"):
        solution = SOLVERS.get("interaction")(problem, max_bytes)
    assert (solution.choice == SOLVERS.get("certified")(problem, max_bytes).choice).all()


@pytest.mark.parametrize("count", [0, 3])
def test_interaction_needs_scores(count: int) -> None:
    problem = correlated_problem(0, 0.5)
    scores = None if count == 0 or problem.scores is None else problem.scores[:count]
    with pytest.raises(ValueError, match=f"and this problem has {count}"):
        SOLVERS.get("interaction")(replace(problem, scores=scores), 10**9)


def spends(problem: Problem, choice: NDArray[np.intp], max_bytes: int) -> bool:
    """Whether no unit's next larger format fits any more."""
    rows = np.arange(len(choice))
    size = problem.bytes[rows, choice]
    larger = problem.allowed & (problem.bytes > size[:, None])
    step = np.where(larger, problem.bytes - size[:, None], np.iinfo(np.int64).max).min()
    return int(step) > max_bytes - int(size.sum())


def test_random_spends_the_budget_without_looking_at_losses() -> None:
    problem = synthetic_problem(60, 8, seed=4)
    max_bytes = int(3.5 * problem.weights / 8)
    random = SOLVERS.get("random")
    plans = [random(problem, max_bytes, seed=s) for s in range(5)]
    assert len({plan.choice.tobytes() for plan in plans}) == 5
    assert all(spends(problem, plan.choice, max_bytes) for plan in plans)
    other = random(replace(problem, loss=problem.loss[:, ::-1].copy()), max_bytes, seed=0)
    assert (other.choice == plans[0].choice).all()
    assert min(plan.loss for plan in plans) > SOLVERS.get("certified")(problem, max_bytes).loss


def test_shuffled_permutes_losses_among_like_units_only() -> None:
    permutation: Callable[..., tuple[NDArray[np.intp], int]]
    permutation = import_module("bitplan.search.solvers.shuffled")._permutation
    size = np.array([[1, 2]] * 6 + [[1, 3]] * 3)
    loss = np.arange(18.0).reshape(9, 2)
    loss[5, 0] = np.inf
    problem = Problem(
        tuple("abcdefghi"), ("f", "g"), size, loss, kinds=("q",) * 3 + ("k",) * 3 + ("q",) * 3
    )
    seen = set()
    for seed in range(20):
        source, mixed = permutation(problem, np.random.default_rng(seed))
        assert mixed == 8
        groups = [sorted(source[part].tolist()) for part in ([0, 1, 2], [3, 4], [5], [6, 7, 8])]
        assert groups == [[0, 1, 2], [3, 4], [5], [6, 7, 8]]
        seen.add(source.tobytes())
    assert len(seen) > 10


def test_shuffled_reports_the_true_loss_and_bound() -> None:
    one = synthetic_problem(1, 8, seed=6)
    generator = np.random.default_rng(0)
    problem = Problem(
        tuple(f"u{u}" for u in range(40)),
        one.formats,
        np.repeat(one.bytes, 40, axis=0),
        one.loss * generator.lognormal(0, 1.5, (40, 1)),
        weights=40 * one.weights,
    )
    max_bytes = int(3.3 * problem.weights / 8)
    solution = SOLVERS.get("shuffled")(problem, max_bytes, seed=1)
    rows = np.arange(40)
    assert solution.loss == pytest.approx(problem.loss[rows, solution.choice].sum())
    assert solution.lower_bound == lower_hull(problem).relax(problem, max_bytes).bound
    assert solution.loss > 1.2 * SOLVERS.get("certified")(problem, max_bytes).loss
    assert "among 40 of 40 units" in solution.note

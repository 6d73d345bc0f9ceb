"""Bootstrap confidence, on Gaussian scores whose true prices are known."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from bitplan.search import confidence
from bitplan.search.confidence import Confidence, bootstrap, more_sequences
from bitplan.search.hull import lower_hull
from bitplan.search.problem import Constraint, Problem


class Synthetic(NamedTuple):
    problem: Problem
    true: NDArray[np.float64]  # prices [U, F] without noise
    max_bytes: int
    choice: NDArray[np.intp]


def synthetic(true: NDArray[np.float64], step: float, sequences: int, seed: int) -> Synthetic:
    """Units of 100, 200, ... bytes and the plan of a budget of ``step`` steps per unit.

    Scores are independent N(0, true), so prices err by true * sqrt(2 / sequences).
    """
    units, formats = true.shape
    normal = np.random.default_rng(seed).standard_normal((sequences, units, formats))
    scores = (normal * np.sqrt(true)).astype(np.float32)
    problem = Problem(
        units=tuple(f"unit{u}" for u in range(units)),
        formats=tuple(f"format{f}" for f in range(formats)),
        bytes=np.tile(100 * np.arange(1, formats + 1), (units, 1)),
        loss=(scores.astype(np.float64) ** 2).mean(axis=0),
        scores=scores,
    )
    max_bytes = round(100 * units * (1 + step))
    choice = lower_hull(problem).relax(problem, max_bytes).choice
    return Synthetic(problem, true, max_bytes, choice)


def log_uniform(units: int, formats: int, seed: int) -> NDArray[np.float64]:
    level = np.exp(np.random.default_rng(seed).uniform(-2, 2, (units, 1)))
    prices: NDArray[np.float64] = level * 4.0 ** -np.arange(formats) / units
    return prices


def total(prices: NDArray[np.float64], choice: NDArray[np.intp]) -> float:
    return float(prices[np.arange(len(choice)), choice].sum())


def test_clear_units_agree_and_ties_do_not() -> None:
    level = np.repeat([1e-3, 1.0, 1e3], 10)[:, None]  # ten of each: the middle ones are ties
    made = synthetic(level * np.array([1.0, 0.25]), 0.5, 64, seed=0)
    result = bootstrap(made.problem, made.max_bytes, made.choice)
    clear = np.r_[0:10, 20:30]
    assert made.choice[clear].tolist() == [0] * 10 + [1] * 10
    assert (result.agreement[clear] == 1).all()
    assert result.agreement[10:20].mean() < 0.85
    assert set(result.undecided) <= {f"unit{u}" for u in range(10, 20)}
    assert len(result.undecided) >= 5
    assert (result.more_sequences[clear] == 0).all()
    named = [made.problem.units.index(name) for name in result.undecided]
    assert (np.diff(result.agreement[named]) >= 0).all()
    assert (result.more_sequences[named] > 0).all()
    assert result.plan == tuple(f"format{f}" for f in made.choice)
    assert result.runner_up == tuple(f"format{1 - f}" for f in made.choice)


def test_agreement_is_that_of_exhaustive_search() -> None:
    # Convex prices, steps of one size, a budget of whole steps: the LP plan is the best of all.
    made = synthetic(log_uniform(5, 3, seed=4), 1.0, 48, seed=1)
    problem = made.problem
    assert problem.scores is not None
    result = bootstrap(problem, made.max_bytes, made.choice, resamples=40, seed=7)
    plans = np.array(list(itertools.product(range(3), repeat=5)))
    rows = np.arange(5)
    plans = plans[problem.bytes[rows, plans].sum(axis=1) <= made.max_bytes]
    random = np.random.default_rng(7)
    taken = np.zeros((5, 3))
    optimism = []
    for _ in range(40):
        weights = random.multinomial(48, [1 / 48] * 48)
        drawn = np.einsum("n,nuf->uf", weights, problem.scores.astype(float) ** 2) / 48
        best = plans[drawn[rows, plans].sum(axis=1).argmin()]
        taken[rows, best] += 1
        excess = problem.loss - drawn
        optimism.append(total(excess, best) - total(excess, made.choice))
    assert result.agreement == pytest.approx(taken[rows, made.choice] / 40)
    assert result.optimism == pytest.approx(np.mean(optimism))
    taken[rows, made.choice] = -1
    runner = [problem.formats.index(name) for name in result.runner_up]
    assert (taken[rows, runner] == taken.max(axis=1)).all()
    assert 0 < result.agreement.min() < 1  # or there was nothing to compare


def test_optimism_is_close_to_the_true_winners_curse() -> None:
    estimated, curse = [], []
    for seed in range(16):
        made = synthetic(log_uniform(60, 4, seed), 1.2, 24, seed)
        result = bootstrap(made.problem, made.max_bytes, made.choice, resamples=60, seed=seed)
        estimated.append(result.optimism)
        # True minus predicted loss of the plan, less that of the plan of the true prices, which
        # was chosen without looking at the noise: the expectation stays, the noise goes.
        unseen = lower_hull(
            Problem(made.problem.units, made.problem.formats, made.problem.bytes, made.true)
        )
        fixed = unseen.relax(made.problem, made.max_bytes).choice
        error = made.true - made.problem.loss
        curse.append(total(error, made.choice) - total(error, fixed))
    assert np.mean(curse) > 0
    assert np.mean(estimated) == pytest.approx(np.mean(curse), rel=0.3)


def test_the_same_seed_gives_the_same_answer() -> None:
    made = synthetic(log_uniform(20, 3, 0), 1.0, 16, seed=0)
    first, again, other = (
        bootstrap(made.problem, made.max_bytes, made.choice, resamples=20, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.optimism == again.optimism != other.optimism
    assert first.runner_up == again.runner_up
    assert (first.agreement == again.agreement).all()
    assert (first.more_sequences == again.more_sequences).all()
    assert (first.agreement != other.agreement).any()


def test_sequences_needed_by_formula() -> None:
    # (1.645 * 2 / 0.1)^2 = 1082.41; (1.645 * 0.5 / 0.1)^2 = 67.7 < 100; 100 * 100 < 1.645^2 * 10^4
    margin = np.array([0.1, -0.1, 0.1, 0.01, 0.0, 0.0])
    deviation = np.array([2.0, 2.0, 0.5, 1.0, 1.0, 0.0])
    expected = [983, 983, 0, np.inf, np.inf, np.inf]
    assert more_sequences(margin, deviation, 100).tolist() == expected


def test_sequences_needed_are_those_of_the_spread_between_sequences() -> None:
    made = synthetic(log_uniform(200, 2, 5), 0.5, 64, seed=5)
    problem, choice, rows = made.problem, made.choice, np.arange(200)
    assert problem.scores is not None
    result = bootstrap(problem, made.max_bytes, choice, resamples=300)
    slope = lower_hull(problem).relax(problem, made.max_bytes).slope
    cost = problem.scores.astype(float) ** 2 + slope * problem.bytes
    margin = cost[:, rows, 1 - choice] - cost[:, rows, choice]  # d(x), [N, U]
    needed = (1.645 * margin.std(axis=0) / margin.mean(axis=0)) ** 2
    middle = (needed > 2 * 64) & (needed < 20 * 64)
    assert middle.sum() > 10
    ratio = (result.more_sequences[middle] + 64) / needed[middle]
    assert np.median(ratio) == pytest.approx(1.0, abs=0.15)
    assert (ratio > 0.5).all() and (ratio < 2.0).all()
    assert (result.more_sequences[needed < 32] == 0).all()
    assert np.isinf(result.more_sequences[needed > 200 * 64]).all()


def test_another_estimator_prices_the_resamples() -> None:
    made = synthetic(log_uniform(30, 2, 2), 0.5, 16, seed=2)
    scores = made.problem.scores
    assert scores is not None
    seen = []

    def smooth(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Nearly the same for every resample: a tenth of the noise."""
        seen.append(weights.sum())
        mixed = 0.9 + 0.1 * weights
        share = mixed / mixed.sum()
        prices: NDArray[np.float64] = np.einsum("n,nuf->uf", share, scores.astype(float) ** 2)
        return prices

    plain = bootstrap(made.problem, made.max_bytes, made.choice, resamples=50)
    smoothed = bootstrap(
        made.problem, made.max_bytes, made.choice, resamples=50, reprice=smooth, sequences=16
    )
    assert seen == [16.0] * 51
    assert smoothed.agreement.mean() > plain.agreement.mean()
    assert abs(smoothed.optimism) < 0.3 * plain.optimism
    with pytest.raises(ValueError, match=r"unit'?.* is priced .* `reprice`"):
        bootstrap(made.problem, made.max_bytes, made.choice, reprice=lambda w: 2 * smooth(w))


def test_units_without_a_choice_and_formats_without_a_price() -> None:
    made = synthetic(log_uniform(8, 3, 1), 1.0, 16, seed=1)
    problem = made.problem
    assert problem.scores is not None
    problem.loss[0, 1:] = np.inf  # pinned
    problem.loss[1, 0], problem.scores[:, 1, 0] = np.inf, np.nan  # not measured
    choice = lower_hull(problem).relax(problem, made.max_bytes).choice
    result = bootstrap(problem, made.max_bytes, choice, resamples=30)
    assert (result.agreement[0], result.runner_up[0], result.more_sequences[0]) == (1, "", 0)
    assert result.runner_up[1] in {"format1", "format2"} - {result.plan[1]}
    assert np.isfinite(result.optimism)


def test_blocks_of_units_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = synthetic(log_uniform(7, 3, 0), 1.0, 16, seed=0)
    whole = bootstrap(made.problem, made.max_bytes, made.choice, resamples=10)
    monkeypatch.setattr(confidence, "BLOCK_SCORES", 2 * 16 * 3)
    split = bootstrap(made.problem, made.max_bytes, made.choice, resamples=10)
    assert (split.agreement == whole.agreement).all()
    assert split.optimism == pytest.approx(whole.optimism, rel=1e-9)


def test_every_resample_is_reported() -> None:
    made = synthetic(log_uniform(4, 2, 0), 0.5, 8, seed=0)
    steps: list[int] = []
    bootstrap(made.problem, made.max_bytes, made.choice, resamples=9, advance=steps.append)
    assert steps == [1] * 9


def test_errors_say_what_to_do() -> None:
    made = synthetic(log_uniform(4, 2, 0), 0.5, 8, seed=0)
    problem, size, choice = made.problem, made.max_bytes, made.choice
    with pytest.raises(ValueError, match=r"no per-sequence scores.*--sequences"):
        bootstrap(replace(problem, scores=None), size, choice)
    with pytest.raises(ValueError, match="1 resamples of 8 sequences"):
        bootstrap(problem, size, choice, resamples=1)
    with pytest.raises(ValueError, match="below the smallest possible plan"):
        bootstrap(problem, 10, choice)
    limits = (Constraint("latency", problem.loss, 1.0, "ms"),)
    with pytest.raises(ValueError, match="bytes alone, but latency"):
        bootstrap(replace(problem, constraints=limits), size, choice)
    problem.loss[2, choice[2]] = np.inf
    with pytest.raises(ValueError, match=r"'unit2' the format .* may not take"):
        bootstrap(problem, size, choice)


def example(undecided: int) -> Confidence:
    agreement = np.ones(20)
    agreement[:undecided] = np.linspace(0.3, 0.85, undecided)
    more = np.zeros(20)
    more[:3] = [np.inf, 1400.0, 0.0]
    return Confidence(
        units=tuple(f"layers.{u}.mlp" for u in range(20)),
        plan=("int3-g64-asym",) * 20,
        agreement=agreement,
        runner_up=("int4-g64-asym",) * 19 + ("",),
        more_sequences=more,
        optimism=0.0123,
        sequences=96,
        resamples=200,
        seed=0,
    )


def test_summary_names_at_most_eight_units() -> None:
    lines = example(12).summary()
    assert lines[0] == (
        "12 of 20 units are undecided (their format changes in more than 10% of 200 bootstrap "
        "resamples):"
    )
    tie, many, no = (line.strip() for line in lines[1:4])
    assert tie == (
        "layers.0.mlp int3-g64-asym 30% (else int4-g64-asym; a tie: more sequences will not "
        "settle it)"
    )
    assert many.endswith("35% (else int4-g64-asym; about 1,400 more sequences)")
    assert no.endswith("40% (else int4-g64-asym; more sequences would not change that)")
    assert len(lines) == 10
    assert lines[-1].strip() == "and 4 more"


def test_summary_of_a_sure_plan() -> None:
    assert example(0).summary() == [
        "All 20 units keep their format in at least 90% of 200 bootstrap resamples."
    ]


def test_the_file_is_plain_json_and_reads_back(tmp_path: Path) -> None:
    path, before = tmp_path / "confidence.json", example(12)
    before.save(path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert data["schema"] == 1
    assert data["undecided"] == before.undecided
    assert data["units"]["layers.0.mlp"]["more_sequences"] == "tie"
    assert data["units"]["layers.19.mlp"]["runner_up"] is None
    after = Confidence.load(path)
    for name in ("units", "plan", "runner_up", "optimism", "sequences", "resamples", "seed"):
        assert getattr(after, name) == getattr(before, name)
    assert (after.agreement == before.agreement).all()
    assert (after.more_sequences == before.more_sequences).all()

    path.write_text(path.read_text().replace('"seed": 0', '"seed": null'))
    with pytest.raises(ValueError, match=r"confidence.json is not a valid confidence: seed"):
        Confidence.load(path)
    with pytest.raises(ValueError, match="--bootstrap"):
        Confidence.load(tmp_path / "missing.json")

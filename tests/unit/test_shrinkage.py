"""Shrunk prices on synthetic scores whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bitplan.sensitivity.shrinkage import Shrinkage

KINDS = ["q"] * 20 + ["down"] * 20


def draw(
    seed: int, count: int, spread: float
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Scores [N, U, F], the diagonal [U, F] and the true prices [U, F]."""
    rng = np.random.default_rng(seed)
    diagonal = np.exp(rng.normal(0, 1.5, (40, 6)))
    level = np.where(np.array(KINDS) == "q", 0.8, 1.3) * np.exp(rng.normal(0, 0.1, 40))
    truth = diagonal * level[:, None] * np.exp(rng.normal(0, spread, diagonal.shape))
    scores = rng.normal(size=(count, 40, 6)) * np.sqrt(truth)
    return scores.astype(np.float32), diagonal, truth


def log_error(prices: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.log(prices / truth) ** 2)))


@pytest.mark.parametrize("count,spread", [(24, 0.15), (96, 0.15), (96, 0.3), (400, 0.1)])
def test_shrunk_prices_err_less_than_both_parts(count: int, spread: float) -> None:
    errors = []
    for seed in range(5):
        scores, diagonal, truth = draw(seed, count, spread)
        shrunk = Shrinkage(scores, diagonal, KINDS).prices()
        probe = (scores.astype(float) ** 2).mean(0)
        errors.append([log_error(p, truth) for p in (shrunk, probe, diagonal)])
    shrunk_error, probe_error, diagonal_error = np.mean(errors, axis=0)
    assert shrunk_error < 0.95 * probe_error
    assert shrunk_error < 0.95 * diagonal_error


def test_the_winners_curse_shrinks() -> None:
    """Of options that differ by noise alone the cheapest one has its price below its truth."""
    gaps = []
    for seed in range(20):
        scores, diagonal, truth = draw(seed, 48, 0.1)
        for prices in (Shrinkage(scores, diagonal, KINDS).prices(), (scores**2).mean(0)):
            best = (prices / diagonal).argmin(1)
            rows = np.arange(40)
            gaps.append(float(np.mean(prices[rows, best] / truth[rows, best])))
    shrunk, probe = np.reshape(gaps, (-1, 2)).mean(axis=0)
    assert probe < 0.85
    assert abs(1 - shrunk) < 0.5 * abs(1 - probe)


def test_many_sequences_give_the_probe_and_one_gives_the_diagonals_shape() -> None:
    scores, diagonal, _ = draw(0, 20_000, 0.4)
    shrunk = Shrinkage(scores, diagonal, KINDS).prices()
    np.testing.assert_allclose(shrunk, (scores.astype(float) ** 2).mean(0), rtol=0.03)
    ratio = Shrinkage(scores[:1], diagonal, KINDS).prices() / diagonal
    for kind in (slice(0, 20), slice(20, 40)):
        np.testing.assert_allclose(ratio[kind], ratio[kind][0, 0], rtol=1e-6)


def test_a_unit_unlike_its_type_does_not_lend_its_spread_to_the_others() -> None:
    """True ratios are all 1 but those of one unit: the others stay as near to them as without."""
    errors = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth = np.ones((40, 6))
        noise = rng.normal(size=(96, 40, 6))
        typical = np.arange(40) != 7
        for outlier in (1.0, 3.0):
            truth[7] = outlier ** np.array([-2, -1, 0, 0, 1, 2])
            scores = (noise * np.sqrt(truth)).astype(np.float32)
            ratio = Shrinkage(scores, np.ones((40, 6)), KINDS).prices()
            errors.append(np.mean((ratio / ratio[typical].mean() - truth)[typical] ** 2))
        errors.append(np.mean(((scores.astype(float) ** 2).mean(0) - truth)[typical] ** 2))
    without, beside, probe = np.reshape(errors, (-1, 3)).mean(axis=0)
    assert without < 0.15 * probe
    assert beside < 0.15 * probe


def test_stderr_is_the_spread_between_draws() -> None:
    """Frequentist check: the error of the price relative to its posterior deviation is about 1."""
    z = []
    for seed in range(20):
        scores, diagonal, truth = draw(seed, 96, 0.15)
        shrinkage = Shrinkage(scores, diagonal, KINDS)
        z.append((shrinkage.prices() - truth) / shrinkage.stderr())
    assert 0.8 < np.sqrt(np.mean(np.square(z))) < 1.3


def test_weights_are_sequences_taken_several_times() -> None:
    scores, diagonal, _ = draw(1, 10, 0.1)
    shrinkage = Shrinkage(scores, diagonal, KINDS)
    np.testing.assert_allclose(shrinkage.prices(np.ones(10)), shrinkage.prices())
    one = np.zeros(10)
    one[3] = 1
    alone = shrinkage.prices(one)
    assert not np.allclose(alone, shrinkage.prices())


def test_lossless_formats_cost_nothing_and_zero_units_do_no_harm() -> None:
    scores, diagonal, _ = draw(2, 30, 0.1)
    diagonal[:, -1] = 0
    scores[:, :, -1] = 0
    diagonal[5] = 0
    scores[:, 5] = 0
    prices = Shrinkage(scores, diagonal, KINDS).prices()
    assert (prices[:, -1] == 0).all() and (prices[5] == 0).all()
    assert np.isfinite(prices).all() and (prices[0, :-1] > 0).all()

"""Empirical Bayes prices: an unbiased, noisy probe shrunk toward a smooth shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Shrinkage:
    """Prices from per-sequence scores and the diagonal's shape, weighted by what each knows.

    The probe's ``mean(s^2)`` is unbiased but errs by about sqrt(2/N), and an optimizer picks
    options whose price erred low (winner's curse).  The diagonal ``E[sum G^2 dW^2] / 2T`` averages
    over all weights of a unit and hardly errs, but ignores off-diagonal curvature, which the
    rounding errors of a unit meet or miss by chance.  The price is between the two:

        price_uf = diagonal_uf * (m + w * (q_uf - m)),    q_uf = mean(s_uf^2) / diagonal_uf,
        w = 1 - noise / spread,

    per matrix type, with m its mean ratio, the spread ``(q_uf - m)^2`` of its ratios and the part
    of it that is noise, as the sequences differ.  Spread and noise are those of the type's median
    unit: a single unit whose ratios are far from m, in SmolLM2 one of 30 value projections, would
    make a mean take the noise of all others for signal.  With many sequences the price tends to
    the probe's, with few to the diagonal at the level of its matrix type.

    Args:
        scores: float32 [N, U, F], signed per-sequence scores s, sqrt(nats per token).
        diagonal: float64 [U, F], the diagonal's price, nats per token; 0 for lossless formats.
        kinds: Matrix type of every unit.

    References:
        Efron and Morris (1975), "Data analysis using Stein's estimator and its generalizations";
        Robbins (1956) for empirical Bayes.
    """

    def __init__(
        self, scores: NDArray[np.float32], diagonal: NDArray[np.float64], kinds: Sequence[str]
    ) -> None:
        count = len(scores)
        self._diagonal = diagonal
        self._lossy = diagonal > 0
        self._kind = np.unique(np.array(kinds), return_inverse=True)[1]
        self._ratios = scores.astype(np.float64)
        self._ratios **= 2
        self._ratios /= np.where(self._lossy, diagonal, np.inf)
        self._weight = self._variance = np.zeros(len(kinds))
        if count > 1:  # one sequence says nothing about its own noise
            ratio = self._ratios.mean(axis=0)
            noise = self._typical(self._ratios.var(axis=0, ddof=1)) / count
            spread = self._typical((ratio - self._level(ratio)[:, None]) ** 2)
            signal = np.maximum(spread - noise, 0.0)
            self._weight = np.divide(signal, spread, out=np.zeros_like(spread), where=spread > 0)
            level = np.array([self._level(one) for one in self._ratios])
            level_noise = level.var(axis=0, ddof=1) / count
            self._variance = self._weight * noise + (1 - self._weight) ** 2 * level_noise

    def prices(self, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """float64 [U, F], nats per token; ``weights`` [N] resample the sequences."""
        if weights is None:
            weights = np.ones(len(self._ratios))
        ratio = np.tensordot(weights / weights.sum(), self._ratios, 1)
        level, weight = self._level(ratio)[:, None], self._weight[:, None]
        prices: NDArray[np.float64] = self._diagonal * (level + weight * (ratio - level))
        return prices

    def stderr(self) -> NDArray[np.float64]:
        """float64 [U, F], posterior standard deviation of the prices, nats per token."""
        result: NDArray[np.float64] = self._diagonal * np.sqrt(self._variance)[:, None]
        return result

    def _level(self, ratio: NDArray[np.float64]) -> NDArray[np.float64]:
        """[U], the mean ratio [U, F] over all lossy options of every unit's kind."""
        options = np.bincount(self._kind, self._lossy.sum(axis=1))
        means = np.bincount(self._kind, ratio.sum(axis=1)) / np.maximum(options, 1)
        return means[self._kind]

    def _typical(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[U], values [U, F] averaged over lossy formats, of the median unit of its kind."""
        options = np.maximum(self._lossy.sum(axis=1), 1)
        per_unit = np.where(self._lossy, values, 0.0).sum(axis=1) / options
        kinds = range(self._kind.max() + 1)
        medians = np.array([np.median(per_unit[self._kind == kind]) for kind in kinds])
        return medians[self._kind]

"""Empirical Bayes prices: an unbiased, noisy probe shrunk toward a smooth shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LEAST = 0.05  # a shrunk ratio stays above this part of its unit's


class Shrinkage:
    """Prices from per-sequence scores and the diagonal's shape, weighted by what each knows.

    The probe's ``mean(s^2)`` is unbiased but errs by about sqrt(2/N), and an optimizer picks
    options whose price erred low (winner's curse).  The diagonal ``E[sum G^2 dW^2] / 2T`` averages
    over all weights of a unit and hardly errs, but ignores off-diagonal curvature.  Their ratio
    ``q = s^2 / diagonal`` is modelled as

        q_uf(x) = m_kind + a_u + e_uf + noise(x),   a_u ~ (0, A),   e_uf ~ (0, E_kind),

    and unit effect and option effect are each multiplied by ``variance / (variance + noise)``,
    with the noise from the spread over sequences and the variances by the method of moments,
    pooled over the units of one kind and their formats (A over all kinds).  The price is the
    shrunk ratio times the diagonal.  With many sequences it tends to the probe, with few to the
    diagonal at the level of its matrix type.

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
        per_unit, per_option = self._levels(self._ratios)
        if count > 1:
            unit_noise = self._by_kind(per_unit.var(axis=0, ddof=1)) / count
            own_noise = self._by_kind(self._over_formats(per_option.var(axis=0, ddof=1))) / count
        else:  # one sequence says nothing about its own noise
            unit_noise = own_noise = np.full(len(kinds), np.inf)
        unit, own = per_unit.mean(axis=0), per_option.mean(axis=0)
        sizes = np.bincount(self._kind)[self._kind]
        spread = (unit - self._by_kind(unit)) ** 2 * sizes / np.maximum(sizes - 1, 1)
        between = (spread - unit_noise)[sizes > 1]
        unit_variance = max(float(between.mean()), 0.0) if between.size else 0.0
        own_variance = self._by_kind(self._over_formats(own**2)) - own_noise
        self._unit_weight = _reliability(np.full(len(kinds), unit_variance), unit_noise)
        self._unit_weight[sizes == 1] = 1.0  # its kind's mean is its own
        self._own_weight = _reliability(np.maximum(own_variance, 0.0), own_noise)
        self._variance = (
            _explained((1 - self._unit_weight) ** 2 / sizes, unit_noise + unit_variance)
            + _explained(self._unit_weight, unit_noise)
            + _explained(self._own_weight, own_noise)
        )

    def prices(self, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """float64 [U, F], nats per token; ``weights`` [N] resample the sequences."""
        if weights is None:
            weights = np.ones(len(self._ratios))
        ratio = np.tensordot(weights / weights.sum(), self._ratios, 1)
        unit, own = self._levels(ratio[None])
        kind = self._by_kind(unit[0])
        level = (kind + self._unit_weight * (unit[0] - kind))[:, None]
        shrunk = np.maximum(level + self._own_weight[:, None] * own[0], _LEAST * level)
        prices: NDArray[np.float64] = self._diagonal * shrunk
        return prices

    def stderr(self) -> NDArray[np.float64]:
        """float64 [U, F], posterior standard deviation of the prices, nats per token."""
        result: NDArray[np.float64] = self._diagonal * np.sqrt(self._variance)[:, None]
        return result

    def _levels(
        self, ratios: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[N, U] means over a unit's lossy formats, and what is left in every option [N, U, F]."""
        unit = self._over_formats(ratios)
        return unit, np.where(self._lossy, ratios - unit[:, :, None], 0.0)

    def _over_formats(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., U], the mean over the formats that are lossy for a unit."""
        means: NDArray[np.float64] = values.sum(axis=-1) / np.maximum(self._lossy.sum(axis=1), 1)
        return means

    def _by_kind(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[U], the mean of the values over the units of every unit's kind."""
        means = np.bincount(self._kind, values) / np.bincount(self._kind)
        return means[self._kind]


def _reliability(variance: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """``variance / (variance + noise)``; 0 where there is no variance or nothing but noise."""
    known = (variance > 0) & np.isfinite(noise)
    return np.divide(variance, variance + noise, out=np.zeros_like(variance), where=known)


def _explained(weight: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """``weight * noise``, 0 where the noise is not known: a part of the posterior variance."""
    return weight * np.where(np.isfinite(noise), noise, 0.0)

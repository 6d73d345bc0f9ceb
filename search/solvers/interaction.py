"""Units that err together: cross-unit covariances as a quadratic term."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem, Solution
from . import SOLVERS
from .certified import certified

MIN_SEQUENCES = 4
MAX_STEPS = 20  # linearizations
MAX_SWAPS = 100
MOVES = 200  # single changes on either side of a swap
TOLERANCE = 1e-12  # relative; smaller gains are rounding

Scores = NDArray[np.float64]  # [N, U, F] or, of a choice, [N, U]; sqrt(nats per token)


@SOLVERS.register("interaction")
def interaction(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Add cross-unit covariances of the scores to the losses; keep what helps on held-out text.

    With signed per-sequence scores s_u(x), the quadratic prediction of the whole plan is
    ``mean_x (sum_u s_u)^2``: the separable ``sum_u mean s_u^2`` plus cross terms.  They are noisy,
    so they are shrunk by a factor alpha toward zero, and the objective is

        sum_u loss_u + alpha (mean_x (sum_u s_u)^2 - sum_u mean_x s_u^2).

    From the separable optimum: price every format by its exact effect on the objective when only
    its unit changes, solve the separable problem at these prices, and accept if the objective
    falls; if not, let only the half of the changed units with the larger effect change, and so
    on; finally swap pairs of units while that helps.

    Whether it helps is measured by cross-validation: plans made from one half of the sequences,
    with and without cross terms, are compared on the other half, both ways.  Unless the cross
    terms lower the predicted loss there by more than its standard error, the separable plan is
    returned with a UserWarning.

    Args:
        problem: The table as arrays, with ``scores``.
        max_bytes: The most bytes the plan may take.
        seed: Unused; the answer is deterministic.

    Returns:
        The plan, with its separable loss and bound, and a note with the held-out figures.

    Raises:
        ValueError: If there are no scores or fewer than four sequences, even the smallest plan
            does not fit, or there are further constraints.

    References:
        Deng et al. (2023), "Mixed-precision quantization with cross-layer dependencies" (CLADO),
        arXiv 2307.05657, for the quadratic program; Schaefer and Strimmer (2005), "A shrinkage
        approach to large-scale covariance matrix estimation", for alpha.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> problem = toy_problem()
        >>> signs = np.array([[1, 1, -1, -1], [-1, -1, 1, 1]] * 4)[:, :, None]  # layers cancel
        >>> signed = replace(problem, scores=(signs * np.sqrt(problem.loss)).astype(np.float32))
        >>> plan = interaction(signed, max_bytes=112)
        >>> plan.choice.tolist(), plan.loss
        ([1, 0, 2, 0], 0.4062652587890625)
        >>> plan.note.partition(":")[0]
        'Cross-unit covariances, shrunk by 1.000, help'
    """
    problem.require_bytes_only("interaction")
    problem.check_feasible(max_bytes)
    scores = _known_scores(problem)
    separable = certified(problem, max_bytes)
    half = len(scores) // 2
    before, after = (
        np.concatenate(parts)
        for parts in zip(
            _held_out(problem, scores[:half], scores[half:], max_bytes),
            _held_out(problem, scores[half:], scores[:half], max_bytes),
            strict=True,
        )
    )
    change = after - before
    error = float(change.std(ddof=1)) / len(change) ** 0.5
    figures = (
        f"held-out predicted loss {before.mean():.6g} without and {after.mean():.6g} with cross "
        f"terms, a change of {change.mean():+.3g} with a standard error of {error:.2g}"
    )
    if not change.mean() + error < 0:
        note = f"Cross-unit covariances do not help: {figures}. The plan is the separable one."
        warnings.warn(note, stacklevel=2)
        return replace(separable, note=note)
    model = _Model.build(problem, scores, separable.choice, max_bytes)
    solution = problem.evaluate(model.improve(separable.choice), separable.lower_bound)
    note = f"Cross-unit covariances, shrunk by {model.alpha:.3f}, help: {figures}."
    return replace(solution, note=note)


def _known_scores(problem: Problem) -> Scores:
    count = 0 if problem.scores is None else len(problem.scores)
    if problem.scores is None or count < MIN_SEQUENCES:
        raise ValueError(
            f"The 'interaction' solver needs the scores of at least {MIN_SEQUENCES} "
            f"calibration samples, and this problem has {count}. Profile with a metric that keeps "
            "them, such as fisher, or use the 'certified' solver."
        )
    return np.where(problem.allowed, np.nan_to_num(problem.scores), 0.0).astype(np.float64)


def _held_out(
    problem: Problem, fit: Scores, test: Scores, max_bytes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predicted loss on every sequence of ``test``, of the plan without and with cross terms."""
    loss = np.where(problem.allowed, (fit**2).mean(axis=0), np.inf)
    fitted = replace(problem, loss=loss)
    separable = certified(fitted, max_bytes).choice
    joint = _Model.build(fitted, fit, separable, max_bytes).improve(separable)
    before, after = (_chosen(test, choice).sum(axis=1) ** 2 for choice in (separable, joint))
    return before, after


def _chosen(scores: Scores, choice: NDArray[np.intp]) -> Scores:
    """float64 [N, U], the scores of a choice."""
    chosen: Scores = scores[:, np.arange(len(choice)), choice]
    return chosen


def shrinkage(chosen: Scores) -> float:
    """Factor for the off-diagonal second moments that minimizes their expected squared error.

    ``1 - sum_{u != v} var(C_uv) / sum_{u != v} C_uv^2``, clipped to [0, 1], with C = mean s s^T.
    All sums come from the N x N Gram matrix: nothing of size U x U is made.

    Args:
        chosen: float64 [N, U], scores of one choice.
    """
    count = len(chosen)
    squares = chosen**2
    moment = squares.mean(axis=0)
    signal = float(((chosen @ chosen.T) ** 2).sum()) / count**2 - float((moment**2).sum())
    products = float((squares.sum(axis=1) ** 2).mean()) - float((squares**2).mean(axis=0).sum())
    noise = (products - signal) / (count - 1)
    return float(np.clip(1 - noise / signal, 0, 1)) if signal > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Model:
    """The objective with cross terms, and how to lower it."""

    problem: Problem
    scores: Scores
    alpha: float
    max_bytes: int

    @classmethod
    def build(
        cls, problem: Problem, scores: Scores, choice: NDArray[np.intp], max_bytes: int
    ) -> _Model:
        """Shrink the cross terms by their noise at ``choice`` [U]."""
        return cls(problem, scores, shrinkage(_chosen(scores, choice)), max_bytes)

    def objective(self, choice: NDArray[np.intp]) -> float:
        """Loss of a choice [U] including its shrunk cross terms."""
        chosen = _chosen(self.scores, choice)
        cross = (chosen.sum(axis=1) ** 2).mean() - (chosen**2).mean(axis=0).sum()
        return self.problem.evaluate(choice, np.inf).loss + self.alpha * float(cross)

    def prices(self, choice: NDArray[np.intp]) -> NDArray[np.float64]:
        """float64 [U, F]; differences in a row are exact when only that unit changes."""
        chosen = _chosen(self.scores, choice)
        others = chosen.sum(axis=1, keepdims=True) - chosen
        cross: NDArray[np.float64] = np.einsum("nuf,nu->uf", self.scores, others) / len(chosen)
        return self.problem.loss + 2 * self.alpha * cross

    def improve(self, choice: NDArray[np.intp]) -> NDArray[np.intp]:
        """intp [U], a choice no worse than ``choice``: linearized steps, then swaps."""
        if self.alpha == 0:
            return choice
        for attempt, limit in ((self._step, MAX_STEPS), (self._swap, MAX_SWAPS)):
            for _ in range(limit):
                better = attempt(choice)
                if better is None:
                    break
                choice = better
        return choice

    def _step(self, choice: NDArray[np.intp]) -> NDArray[np.intp] | None:
        """The separable optimum at the current prices, damped until the objective falls."""
        rows = np.arange(len(choice))
        prices = self.prices(choice)
        stay = np.zeros(prices.shape, dtype=bool)
        stay[rows, choice] = True
        free = np.ones(len(choice), dtype=bool)
        while True:
            loss = np.where(free[:, None] | stay, prices, np.inf)
            target = certified(replace(self.problem, loss=loss), self.max_bytes).choice
            if self._falls(choice, target):
                return target
            moved = np.flatnonzero(target != choice)
            if len(moved) < 2:
                return None
            effect = np.abs(prices[moved, choice[moved]] - prices[moved, target[moved]])
            free[:] = False
            free[moved[np.argsort(-effect, kind="stable")[: len(moved) // 2]]] = True

    def _swap(self, choice: NDArray[np.intp]) -> NDArray[np.intp] | None:
        """The best change of one unit, or of a pair that trades bytes, if one helps."""
        rows = np.arange(len(choice))
        prices = self.prices(choice)
        change = prices - prices[rows, choice][:, None]
        extra = self.problem.bytes - self.problem.bytes[rows, choice][:, None]
        slack = self.max_bytes - int(self.problem.bytes[rows, choice].sum())
        gain_unit, gain_format = _best_moves(change / np.maximum(extra, 1), change < 0)
        free_unit, free_format = _best_moves(
            change / np.maximum(-extra, 1), (extra < 0) & np.isfinite(change)
        )
        chosen = _chosen(self.scores, choice)
        gain_shift = self.scores[:, gain_unit, gain_format] - chosen[:, gain_unit]
        free_shift = self.scores[:, free_unit, free_format] - chosen[:, free_unit]
        together = 2 * self.alpha * (gain_shift.T @ free_shift) / len(chosen)
        effect = change[gain_unit, gain_format][:, None] + np.hstack(
            [np.zeros((len(gain_unit), 1)), change[free_unit, free_format] + together]
        )  # the first column changes nothing else
        size = extra[gain_unit, gain_format][:, None] + np.append(0, extra[free_unit, free_format])
        effect[(size > slack) | (gain_unit[:, None] == np.append(-1, free_unit))] = np.inf
        if not effect.size or not effect.min() < 0:
            return None
        first, second = np.unravel_index(int(effect.argmin()), effect.shape)
        target = choice.copy()
        target[gain_unit[first]] = gain_format[first]
        if second:
            target[free_unit[second - 1]] = free_format[second - 1]
        return target if self._falls(choice, target) else None

    def _falls(self, choice: NDArray[np.intp], target: NDArray[np.intp]) -> bool:
        before = self.objective(choice)
        return self.objective(target) < before - TOLERANCE * abs(before)


def _best_moves(
    rate: NDArray[np.float64], possible: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Units and formats of the MOVES possible moves with the least rate [U, F], loss per byte."""
    unit, target = np.nonzero(possible)
    best = np.argsort(rate[unit, target], kind="stable")[:MOVES]
    return unit[best], target[best]

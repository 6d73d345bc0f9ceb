"""How far to trust sums over few sequences, found out on others that they were not made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._base.memory import Room, memory_of_machine
from .._base.threads import parallel_map
from ..quantizers.format import Format
from ..quantizers.methods import METHODS, Evidence, Method
from ..quantizers.store import COPIES
from .kept_sums import Fold, mean_diagonal, restored

WIDTHS = ("int2-g64-asym", "int4-g64-asym")
ROWS = 48  # of a matrix, enough to tell mixtures apart
SHARES = ((0.0, 0.0), (1.0, 0.1), (1.0, 0.3), (1.0, 1.0))  # token and plain
DENSE_SHARES = ((0.0, 0.0), (0.0, 0.1), (0.0, 0.3))  # without a token form
DAMPING = (0.1, 0.01, 0.03, 0.3, 1.0)  # the first while shares are chosen
# What a choice depends on besides the sums.
GRID = f"{WIDTHS} {ROWS} {SHARES} {DENSE_SHARES} {DAMPING}"


@dataclass(frozen=True, slots=True)
class Mixture:
    """What evidence is made of.

    Attributes:
        token: How much of the per-token form is added to the per-sequence form.
        plain: How much of the inputs' second moments is added.
        damping: What is added to the diagonal, as a multiple of its mean; None for the method's
            own default.
    """

    token: float = 1.0
    plain: float = 0.3
    damping: float | None = None

    def evidence(self, fold: Fold, hessian: Tensor | None = None) -> Evidence:
        """The evidence on a matrix, [cols, cols] or [parts, cols, cols]."""
        fisher = fold.fisher(self.token, self.plain)
        fisher = fisher[0] if len(fisher) == 1 else fisher
        return Evidence(hessian, fisher, fold.relative_rows(), self.damping)

    def per_token(self, fold: Fold) -> tuple[float, float]:
        """What tokens weigh in the part of the curvature that is a sum over tokens.

        Returns:
            a and b: that part is ``sum_t (a |d_t|^2 + b) x_t x_t^T``.
        """
        level = {name: float(mean_diagonal(form)[0]) for name, form in fold.forms.items()}
        whole = (1 + self.token + self.plain) * max(fold.tokens * len(fold.rows), 1)
        shares = {"token": self.token, "plain": self.plain}
        a, b = (
            share * level["sequence"] / (level[name] * whole) if level[name] > 0 else 0.0
            for name, share in shares.items()
        )
        return a, b

    def with_tokens(self, fold: Fold, tokens: Tensor) -> Evidence:
        """The evidence on a matrix with another sum over tokens, [cols, cols]."""
        fisher = tokens + fold.fisher()[0] / (1 + self.token + self.plain)
        return Evidence(None, fisher, fold.relative_rows(), self.damping)

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


UNTESTED = Mixture()  # where there are too few sequences to choose by


@dataclass(frozen=True)
class Trial:
    """A matrix, or a block of one, to choose on.

    Attributes:
        weight: Some rows [rows, cols].
        folds: Sums over two halves of the sequences, for these rows.
    """

    weight: Tensor
    folds: tuple[Fold, Fold]

    @classmethod
    def of(cls, weight: Tensor, folds: tuple[Fold, Fold]) -> Trial | None:
        """The rows of a matrix to choose on; None if no block of it was reached in both halves."""
        parts = len(folds[0].forms["sequence"])
        for number, block in enumerate(weight.chunk(parts)):
            both = folds[0].part(number), folds[1].part(number)
            if all(fold.tokens and fold.rows.any() for fold in both):
                rows = torch.linspace(0, len(block) - 1, min(ROWS, len(block))).long()
                first, second = (_with_rows(fold, rows) for fold in both)
                return cls(block[rows].float(), (first, second))
        return None

    def costs(
        self, method: Method, formats: Sequence[Format], mixtures: Sequence[Mixture], half: int
    ) -> NDArray[np.float64]:
        """Costs by one half of the sequences, rounded by the other: [mixtures, formats].

        Args:
            method: The rounding method.
            formats: The formats.
            mixtures: The mixtures.
            half: Which half to round by, 0 or 1.
        """
        found = np.zeros((len(mixtures), len(formats)))
        given, other = self.folds if half == 0 else self.folds[::-1]
        judge, rows = restored(other.forms["sequence"])[0], other.relative_rows()
        for m, mixture in enumerate(mixtures):
            evidence = mixture.evidence(given)
            for f, fmt in enumerate(formats):
                error = method(self.weight, fmt, evidence).dequantize() - self.weight
                found[m, f] = float(((error @ judge) * error).sum(1) @ rows)
        return found


def choose(trials: Sequence[Trial], rounding: str) -> Mixture:
    """The mixture, and then the damping, with the least cost on sequences it was not made from.

    Matrices are rounded with sums over one half of the sequences, the next matrix with those over
    the other, and their errors priced with the per-sequence sums over the half that was left; costs
    are compared by their geometric mean over matrices and widths, so that none outweighs the
    others. A single matrix is rounded with either.

    Args:
        trials: Matrices of one kind.
        rounding: Name of the rounding method.

    References:
        Stone (1974), "Cross-validatory choice and assessment of statistical predictions".
    """
    formats = formats_for(rounding)
    if not trials or not formats:
        return UNTESTED
    with_factors = any("token" in trial.folds[0].forms for trial in trials)
    shares = SHARES if with_factors else DENSE_SHARES
    mixtures = [Mixture(token, plain, DAMPING[0]) for token, plain in shares]
    mixed = _costs(trials, rounding, formats, mixtures)
    best = mixtures[int(mixed.argmin())]
    others = [replace(best, damping=value) for value in DAMPING[1:]]
    damped = [mixed.min(), *_costs(trials, rounding, formats, others)]
    curve = np.polynomial.Polynomial.fit(np.log(DAMPING), damped, 2)  # single costs jump
    tried = np.geomspace(min(DAMPING), max(DAMPING), 41)
    return replace(best, damping=round(float(tried[curve(np.log(tried)).argmin()]), 4))


def formats_for(rounding: str) -> list[Format]:
    """The widths to try that a method has codes of its own for."""
    rounds = METHODS.trait(rounding, "rounds", lambda _: True)
    return [fmt for fmt in map(Format.parse, WIDTHS) if rounds(fmt)]


def _costs(
    trials: Sequence[Trial], rounding: str, formats: Sequence[Format], mixtures: Sequence[Mixture]
) -> NDArray[np.float64]:
    """Logarithms of mean costs [mixtures]."""
    method = METHODS.get(rounding)

    room = Room(memory_of_machine() // 2)

    def work(one: tuple[int, Trial]) -> NDArray[np.float64]:
        with room.take(4 * COPIES * one[1].weight.shape[1] ** 2):
            return one[1].costs(method, formats, mixtures, one[0] % 2)

    each = list(enumerate(trials if len(trials) > 1 else [*trials, *trials]))
    found = np.stack(list(parallel_map(work, each, trials[0].weight.device)))
    logs = np.log(np.maximum(found, np.finfo(np.float64).tiny))
    means: NDArray[np.float64] = logs.mean(axis=(0, 2))
    return means


def _with_rows(fold: Fold, rows: Tensor) -> Fold:
    return replace(fold, rows=fold.rows[rows])

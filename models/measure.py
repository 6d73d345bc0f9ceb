"""Measure plans on held-out batches: KL divergence and perplexity per sequence, paired."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rendering import Assignment, Renderer
from .samples import Samples
from .workload import Batch, LoadedModel

Run = Callable[[Batch], Tensor]  # batch -> logits [samples, positions, classes]
# KL per sequence so far, of all candidates on the same sequences -> those to go on with.
Chooser = Callable[[Mapping[str, NDArray[np.float64]]], Collection[str]]

_ROWS = 256  # positions compared at a time, so that temporaries stay small


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one candidate did on every sequence.

    Attributes:
        kl: float64 [N], KL(p_original || p_candidate) per sequence, mean nats per token.
        nll: float64 [N], negative log-likelihood per sequence, mean nats per predicted token;
            None for models that do not read text.
        tokens: Positions measured in all.
    """

    kl: NDArray[np.float64]
    nll: NDArray[np.float64] | None
    tokens: int

    @property
    def mean_kl(self) -> float:
        """Mean KL in nats per token."""
        return float(self.kl.mean())

    @property
    def kl_stderr(self) -> float:
        """Standard error of :attr:`mean_kl` over sequences."""
        return standard_error(self.kl)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-likelihood."""
        return None if self.nll is None else float(np.exp(self.nll.mean()))

    def minus(self, other: Measurement) -> tuple[float, float]:
        """Difference of mean KL and its standard error, paired over the sequences both have."""
        shared = min(len(self.kl), len(other.kl))
        difference = self.kl[:shared] - other.kl[:shared]
        return float(difference.mean()), standard_error(difference)


def standard_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean; NaN-free: 0 for a single value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def measure(
    original: LoadedModel,
    candidates: Mapping[str, Run],
    samples: Samples,
    advance: Callable[[], None] = lambda: None,
    reference: Run | None = None,
    keep: Chooser | None = None,
) -> tuple[dict[str, Measurement], float | None]:
    """Run the original and all candidates batch by batch and compare their distributions.

    The original's log-probabilities live for one batch only and are exact, so no logits are
    stored or rounded, whatever the vocabulary or the length of the text.

    Args:
        original: The reference model.
        candidates: Name -> function from a batch to logits.
        samples: Held-out batches.
        advance: Called (1 + candidates) times per batch, for every forward pass and for those that
            are left out.
        reference: Runs the original, for a caller that keeps something of that pass for the
            candidates, which run on the same batch right after it.
        keep: Asked after every batch which candidates to go on with; the others are left with what
            was measured of them.

    Returns:
        Measurements by name, and the perplexity of the original (None without text).
    """
    tally = Tally(candidates)
    left: Collection[str] = candidates
    with torch.no_grad():
        for batch in samples.batches:
            labels = labels_in(original, batch)
            log_p = (reference or original.logits)(batch).log_softmax(-1)
            tally.original(log_p, labels)
            advance()
            for name, run in candidates.items():
                if name in left:
                    tally.add(name, log_p, run(batch), labels)
                advance()
            if keep is not None:
                left = keep(tally.kl(left))
    return tally.result()


class Tally:
    """KL and likelihood of candidates, batch by batch.

    Args:
        names: The candidates.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._kl: dict[str, list[Tensor]] = {name: [] for name in names}
        self._nll: dict[str, list[Tensor]] = {name: [] for name in (*names, "")}
        self._tokens = dict.fromkeys(names, 0)

    def original(self, log_p: Tensor, labels: Tensor | None) -> None:
        """See log-probabilities [samples, positions, classes] of the original on a batch."""
        if labels is not None:
            self._nll[""].append(_negative_log_likelihood(log_p, labels))

    def add(self, name: str, log_p: Tensor, logits: Tensor, labels: Tensor | None) -> None:
        """See logits of a candidate on a batch, and the original's log-probabilities."""
        self._tokens[name] += log_p.shape[0] * log_p.shape[1]
        self._kl[name].append(_divergence(log_p, logits))
        if labels is not None:
            self._nll[name].append(_negative_log_likelihood(logits, labels))

    def kl(self, names: Collection[str]) -> dict[str, NDArray[np.float64]]:
        """KL per sequence so far."""
        return {name: _join(self._kl[name]) for name in self._kl if name in names}

    def result(self) -> tuple[dict[str, Measurement], float | None]:
        """Measurements by name, and the perplexity of the original (None without text)."""
        measured = {
            name: Measurement(
                _join(self._kl[name]),
                _join(self._nll[name]) if self._nll[name] else None,
                self._tokens[name],
            )
            for name in self._kl
        }
        perplexity = float(np.exp(_join(self._nll[""]).mean())) if self._nll[""] else None
        return measured, perplexity


def labels_in(model: LoadedModel, batch: Batch) -> Tensor | None:
    """The tokens that a model is to predict, if it reads text."""
    return batch if model.is_language_model and isinstance(batch, Tensor) else None


def plan_runner(model: LoadedModel, renderer: Renderer, assignment: Assignment) -> Run:
    """A candidate for :func:`measure`: the model with weights rendered as a plan says."""

    def run(batch: Batch) -> Tensor:
        with renderer.applied(assignment):
            return model.logits(batch)

    return run


def _join(parts: list[Tensor]) -> NDArray[np.float64]:
    joined: NDArray[np.float64] = torch.cat(parts).double().cpu().numpy()
    return joined


def _divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL per sequence [samples] from log-probabilities and logits [samples, T, classes]."""
    rows = [
        (p.exp() * (p - q.log_softmax(-1))).sum(-1)
        for p, q in zip(
            log_p.flatten(0, 1).split(_ROWS), logits.flatten(0, 1).split(_ROWS), strict=True
        )
    ]
    return torch.cat(rows).view(log_p.shape[:2]).double().mean(1)


def _negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean -log p(next token) per sequence [samples]."""
    predicted = logits[:, :-1]
    chosen = predicted.gather(-1, labels[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (predicted.logsumexp(-1) - chosen).double().mean(1)

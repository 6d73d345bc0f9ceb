"""The model's distribution kept small: its k likeliest classes and the mass of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 256  # positions compared at a time, so that temporaries stay small


@dataclass(frozen=True, slots=True)
class TopK:
    """A distribution over k + 1 outcomes per position: its k likeliest classes and "any other".

    The KL divergence between two distributions coarsened in this way, with the k classes of the
    first, never exceeds the KL divergence of the full distributions (data-processing inequality:
    merging outcomes loses information), and equals it when k is the number of classes.

    Attributes:
        ids: int32 [samples, positions, k], the classes.
        logits: float32 [samples, positions, k + 1], their logits and the logsumexp of all others';
            [samples, positions, k] when there are no others.
    """

    ids: Tensor
    logits: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopK:
        """Keep the ``k`` likeliest classes of logits [samples, positions, classes]."""
        ids = logits.topk(min(k, logits.shape[-1])).indices
        return cls(ids.int(), _coarsened(logits, ids))

    @classmethod
    def stack(cls, samples: Sequence[TopK]) -> TopK:
        """Join single samples, each [positions, ...], to [samples, positions, ...]."""
        ids, logits = zip(*((s.ids, s.logits) for s in samples), strict=True)
        return cls(torch.stack(ids), torch.stack(logits))

    def samples(self) -> list[TopK]:
        """The samples one by one: the inverse of :meth:`stack`."""
        return [TopK(i.clone(), x.clone()) for i, x in zip(self.ids, self.logits, strict=True)]

    def kl(self, logits: Tensor) -> Tensor:
        """KL(self || softmax(logits)) over the coarsened outcomes.

        Both sides are normalized in float64, few as their outcomes are: what float32 logits are
        off by then changes a small KL to second order only.

        Args:
            logits: [samples, positions, classes] on the same inputs.

        Returns:
            float64 [samples], mean nats per position.
        """
        log_p = self.logits.double().log_softmax(-1)
        log_q = _coarsened(logits, self.ids.long()).double().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)


def _coarsened(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits [..., k + 1] of classes ``ids`` [..., k] and of all others of [..., classes] together.

    The others' mass is summed up itself rather than taken as 1 minus the k classes', which would
    cancel where these hold nearly everything.
    """
    chosen = logits.gather(-1, ids)
    if ids.shape[-1] == logits.shape[-1]:
        return chosen
    others = [
        rows.scatter(-1, where, -torch.inf).logsumexp(-1, keepdim=True)
        for rows, where in zip(*(x.flatten(0, -2).split(_ROWS) for x in (logits, ids)), strict=True)
    ]
    return torch.cat([chosen, torch.cat(others).view(*ids.shape[:-1], 1)], -1)

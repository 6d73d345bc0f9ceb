"""Per-sequence Fisher probe with sampled labels (the default)."""

from __future__ import annotations

import torch

from ..probes import label_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores


@METRICS.register("fisher")
def fisher(task: Task) -> Scores:
    r"""Price every rendering error with the exact Gauss-Newton form of the KL divergence.

    For a sequence x with labels y_t ~ p(.|x_<t) and G_u(x) the gradient of
    ``sum_t -log p(y_t)``: ``s = <G_u(x), dW_uf> / sqrt(2 T)``, predicted KL = mean_x s^2, an
    unbiased estimate of ``dW' F dW / 2`` per token: label noise is independent across positions,
    so cross terms vanish in expectation. The relative standard error is about sqrt(2/N).

    Returns:
        Signed scores [N, U, F] in sqrt(nats per token).

    References:
        Martens (2020), New insights and perspectives on the natural gradient method, JMLR 21.
    """
    generator = torch.Generator().manual_seed(task.seed)
    return Scores(gradient_scores(task, label_upstream(generator)), signed=True, in_nats=True)

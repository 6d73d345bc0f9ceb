"""Per-sequence Fisher probe with Gaussian noise at the logits."""

from __future__ import annotations

import numpy as np
import torch

from ..factors import inner
from ..probes import gaussian_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores


@METRICS.register("fisher_gaussian")
def fisher_gaussian(task: Task) -> Scores:
    """The Fisher probe with the same covariance at the logits, drawn from a Gaussian.

    Same expectation and cost as ``fisher``; the benchmark table compares their variance.

    Returns:
        Signed scores [N, U, F] in sqrt(nats per token).

    References:
        Hutchinson (1989); Dangel, Kunstner & Hennig (2020), BackPACK, on sampled GGN factors.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = fisher_gaussian(task)
        >>> scores.values.shape, scores.in_nats
        ((16, 4, 3), True)
        >>> print((scores.values**2).mean(0)[:, 1].round(5))  # at 4 bits
        [0.00215 0.00065 0.00141 0.00153]
    """
    generator = torch.Generator().manual_seed(task.seed)
    (scores,), positions = gradient_scores(task, gaussian_upstream(generator), [inner])
    return Scores((scores / np.sqrt(2 * positions)).astype(np.float32), signed=True, in_nats=True)

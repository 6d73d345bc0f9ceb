"""Fisher probe with sampled labels, shrunk toward its own diagonal (the default)."""

from __future__ import annotations

import numpy as np
import torch

from ..factors import inner, squared
from ..probes import label_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores


@METRICS.register("fisher")
def fisher(task: Task) -> Scores:
    r"""Gauss-Newton form of the KL divergence, shrunk toward its diagonal by its own noise.

    For a sequence x with labels y_t ~ p(.|x_<t) and G_u(x) the gradient of
    ``sum_t -log p(y_t)``: ``s = <G_u(x), dW_uf> / sqrt(2 T)``.  mean_x s^2 is an unbiased estimate
    of ``dW' F dW / 2`` per token (label noise is independent across positions, so cross terms
    vanish in expectation) with a relative standard error of about sqrt(2/N).  The diagonal
    ``sum G^2 dW^2 / 2T`` of the same pass hardly errs; the price combines both
    (:class:`..shrinkage.Shrinkage`), so that an optimizer finds less noise to exploit.

    Returns:
        Signed scores [N, U, F] in sqrt(nats per token), and the diagonal.

    References:
        Martens (2020), New insights and perspectives on the natural gradient method, JMLR 21;
        Efron and Morris (1975) for the shrinkage.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = fisher(task)
        >>> scores.values.shape, scores.in_nats
        ((16, 4, 3), True)
        >>> print((scores.values**2).mean(0)[:, 1].round(5))  # at 4 bits
        [0.00376 0.00075 0.00112 0.0016 ]
    """
    generator = torch.Generator().manual_seed(task.seed)
    (scores, diagonal), positions = gradient_scores(
        task, label_upstream(generator), [inner, squared]
    )
    return Scores(
        (scores / np.sqrt(2 * positions)).astype(np.float32),
        signed=True,
        in_nats=True,
        diagonal=(diagonal / (2 * positions)).mean(axis=0),
    )

"""Diagonal of the Fisher matrix."""

from __future__ import annotations

import numpy as np
import torch

from ..factors import squared
from ..probes import label_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores


@METRICS.register("fisher_diagonal")
def fisher_diagonal(task: Task) -> Scores:
    """Mean squared gradient of every weight, labels sampled from the model: smooth, and blind.

    A price is ``sum_rc E[G_rc^2] dW_rc^2 / 2T``.

    The other part of ``fisher``, which see: it leaves out how the errors of different weights
    line up.

    Returns:
        Non-negative scores [N, U, F] in nats per token.

    References:
        Kirkpatrick et al. (2017), Overcoming catastrophic forgetting (the Fisher diagonal).

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = fisher_diagonal(task)
        >>> scores.values.shape, scores.in_nats
        ((16, 4, 3), True)
        >>> print(scores.values.mean(0)[:, 1].round(5))  # at 4 bits
        [0.00336 0.00062 0.00113 0.00149]
    """
    generator = torch.Generator().manual_seed(task.seed)
    (scores,), positions = gradient_scores(task, label_upstream(generator), [squared])
    return Scores((scores / (2 * positions)).astype(np.float32), signed=False, in_nats=True)

"""Diagonal of the empirical Fisher matrix."""

from __future__ import annotations

import numpy as np
import torch

from ..factors import squared
from ..probes import data_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores


@METRICS.register("gradient")
def gradient(task: Task) -> Scores:
    """Mean squared gradient of every weight, labels of the text itself (SqueezeLLM).

    A price is ``sum_rc E[g_rc^2] dW_rc^2 / 2`` per token.

    Keeps the diagonal only and takes data labels for model labels, so it is in nats only as far
    as both hold; errors of a tied weight's uses are added without their cross term.

    Returns:
        Non-negative scores [N, U, F] in nats per token.

    References:
        Kim et al. (2023), SqueezeLLM, Sec. 4.1; Guo et al. (2024), LQ-LoRA, Sec. 3.2.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = gradient(task)
        >>> scores.values.shape, scores.in_nats
        ((16, 4, 3), True)
        >>> print(scores.values.mean(0)[:, 1].round(5))  # at 4 bits
        [0.00336 0.00062 0.00113 0.00149]
    """
    generator = torch.Generator().manual_seed(task.seed)
    upstream = data_upstream(generator, task.model.is_language_model)
    unlabelled = 1 if task.model.is_language_model else 0
    (scores,), positions = gradient_scores(task, upstream, [squared], unlabelled)
    return Scores((scores / (2 * positions)).astype(np.float32), signed=False, in_nats=True)

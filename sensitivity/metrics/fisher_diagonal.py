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
    """
    generator = torch.Generator().manual_seed(task.seed)
    (scores,), positions = gradient_scores(task, label_upstream(generator), [squared])
    return Scores((scores / (2 * positions)).astype(np.float32), signed=False, in_nats=True)

"""First-order Taylor score: gradient times weight error, absolute."""

from __future__ import annotations

import numpy as np
import torch

from ..factors import absolute
from ..probes import data_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores


@METRICS.register("taylor")
def taylor(task: Task) -> Scores:
    """Absolute gradient times absolute error, labels of the text itself: AutoScheme's score.

    A price is ``sum_rc |g_rc dW_rc|`` per token.

    A bound on the first-order change of the loss, not an estimate of it: signs are dropped.
    AutoScheme takes g with all layers quantized; here it is taken at the original weights.

    Returns:
        Non-negative scores [N, U, F], not in nats.

    References:
        AutoRound's AutoScheme (delta loss); Molchanov et al. (2019), Importance estimation for
        neural network pruning, for the first-order score.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = taylor(task)
        >>> scores.values.shape, scores.in_nats
        ((16, 4, 3), False)
        >>> print(scores.values.mean(0)[:, 1].round(3))  # at 4 bits
        [0.473 0.211 0.397 0.459]
    """
    generator = torch.Generator().manual_seed(task.seed)
    upstream = data_upstream(generator, task.model.is_language_model)
    unlabelled = 1 if task.model.is_language_model else 0
    (scores,), positions = gradient_scores(task, upstream, [absolute], unlabelled)
    return Scores((scores / positions).astype(np.float32), signed=False, in_nats=False)

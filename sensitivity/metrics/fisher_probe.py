"""Per-sequence Fisher probe with sampled labels, as it is."""

from __future__ import annotations

import numpy as np
import torch

from ..factors import inner
from ..probes import label_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores


@METRICS.register("fisher_probe")
def fisher_probe(task: Task) -> Scores:
    """Squared inner product of gradient and error, labels from the model: unbiased, and noisy.

    A price is ``mean <G, dW>^2 / 2T``.

    One of the two parts of ``fisher``, which see.

    Returns:
        Signed scores [N, U, F] in sqrt(nats per token).

    References:
        Martens (2020), New insights and perspectives on the natural gradient method, JMLR 21.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = fisher_probe(task)
        >>> scores.values.shape, scores.in_nats
        ((16, 4, 3), True)
        >>> print((scores.values**2).mean(0)[:, 1].round(5))  # at 4 bits
        [0.00376 0.00075 0.00112 0.0016 ]
    """
    generator = torch.Generator().manual_seed(task.seed)
    (scores,), positions = gradient_scores(task, label_upstream(generator), [inner])
    return Scores((scores / np.sqrt(2 * positions)).astype(np.float32), signed=True, in_nats=True)

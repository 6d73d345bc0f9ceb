"""Squared weight error, the data-free baseline."""

from __future__ import annotations

import numpy as np

from ..errors import squared_errors
from . import METRICS, Scores, Task


@METRICS.register("weight_mse", reads="weights")
def weight_mse(task: Task) -> Scores:
    """Squared error of the weights: every weight matters alike. Needs no data.

    A price is ``||dW||^2`` summed over a unit.

    Returns:
        Scores [1, U, F], not in nats.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = weight_mse(task)
        >>> scores.values.shape, scores.in_nats
        ((1, 4, 3), False)
        >>> print(scores.values.mean(0)[:, 1].round(3))  # at 4 bits
        [0.239 0.241 0.474 0.505]
    """
    values = np.zeros((1, len(task.units), len(task.formats)), dtype=np.float32)
    for i, unit in enumerate(task.units):
        for name in unit.modules:
            values[0, i] += squared_errors(task.renderer, name, task.formats)
    task.advance(task.samples.count)
    return Scores(values, signed=False, in_nats=False)

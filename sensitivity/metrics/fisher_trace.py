"""Trace of the Fisher matrix times the squared weight error."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import squared_errors
from ..factors import gradient_norm
from ..probes import label_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores


@METRICS.register("fisher_trace")
def fisher_trace(task: Task) -> Scores:
    """Squared error times the mean curvature of its matrix, from one Fisher probe (HAWQ-V2).

    A price is ``tr(F_u) / (2 D_u) * ||dW_uf||^2``.

    At the original weights the Hessian of the KL is the Fisher matrix, and ``E||G||^2`` its
    trace: the same quantity as ``hessian_trace`` without double backward. Assumes that the
    curvature of a unit is isotropic.

    Returns:
        Non-negative scores [N, U, F] in nats per token under the isotropic assumption.

    References:
        Dong et al. (2020), HAWQ-V2, Sec. 3.2.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = fisher_trace(task)
        >>> scores.values.shape, scores.in_nats
        ((16, 4, 3), True)
        >>> print(scores.values.mean(0)[:, 1].round(5))  # at 4 bits
        [0.00313 0.00063 0.00115 0.00147]
    """
    generator = torch.Generator().manual_seed(task.seed)
    (norms,), positions = gradient_scores(task, label_upstream(generator), [gradient_norm])
    errors = np.zeros((len(task.units), len(task.formats)))
    for u, unit in enumerate(task.units):
        for name in unit.modules:
            errors[u] += squared_errors(task.renderer, name, task.formats) / unit.weights
    values = norms / (2 * positions) * errors
    return Scores(values.astype(np.float32), signed=False, in_nats=True)

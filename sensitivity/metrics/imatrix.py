"""Weight error weighted by the second moment of the inputs."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...quantizers.store import Rows
from ..errors import map_errors
from . import METRICS, Scores, Task
from ._input_moments import Key, input_moments, moment_scores


@METRICS.register("imatrix", reads="inputs")
def imatrix(task: Task) -> Scores:
    """Squared error weighted by the mean square of each input: llama.cpp's importance matrix.

    A price is ``sum_rc E[x_c^2] dW_rc^2``.

    The diagonal of ``salience``: blind to how inputs correlate and to what the rest of the
    network does with the output. An embedding's rows weigh as often as they are looked up.

    Returns:
        Scores [1, U, F], squared output error per position; not in nats.

    References:
        llama.cpp, ``llama-imatrix``; Lin et al. (2024), AWQ, for activation-aware weights.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = imatrix(task)
        >>> scores.values.shape, scores.in_nats
        ((1, 4, 3), False)
        >>> print(scores.values.mean(0)[:, 1].round(3))  # at 4 bits
        [0.143 0.009 0.062 0.072]
    """
    moments, positions, reach = input_moments(task, lambda x: x.square().sum(0), "imatrix")

    def price(key: Key) -> NDArray[np.float64]:
        count = task.renderer.weight(key.name).shape[0]
        work = partial(_weighted_error, moments[key], count)
        errors = map_errors(work, task.renderer, key.name, task.formats)
        return sum((e.double().cpu().numpy() for e in errors), np.zeros(len(task.formats)))

    values = moment_scores(task, moments, reach, price)
    return Scores((values / positions).astype(np.float32), signed=False, in_nats=False)


def _weighted_error(moment: Tensor, count: int, rows: Rows, errors: Tensor) -> Tensor:
    """Weighted squares of the errors [F, rows, cols] of some of ``count`` rows: [F].

    The moment is [channel_groups, cols], or one count per row for an embedding.
    """
    if moment.dim() == 1:
        return torch.einsum("frc,frc,r->f", errors, errors, moment[rows])
    group = torch.arange(count, device=errors.device)[rows] // (count // len(moment))
    return torch.einsum("frc,frc,rc->f", errors, errors, moment[group])

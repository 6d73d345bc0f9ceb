"""Layer-output error under the second moment of the activations."""

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


@METRICS.register("salience", reads="inputs")
def salience(task: Task) -> Scores:
    """Squared error of the layer's output on calibration inputs (GPTQ's objective).

    A price is ``tr(dW H dW')`` with ``H = E[x x']``.

    One forward pass collects H [cols, cols] per matrix (counts per token for an embedding), all
    of which are in memory at once: 4 * cols^2 bytes each. The errors are priced afterwards.
    Blind to what the rest of the network does with the output.

    Returns:
        Scores [1, U, F], squared output error per position; not in nats.

    References:
        Frantar et al. (2023), GPTQ, Eq. 1; Nagel et al. (2020), AdaRound, Sec. 3.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = salience(task)
        >>> scores.values.shape, scores.in_nats
        ((1, 4, 3), False)
        >>> print(scores.values.mean(0)[:, 1].round(3))  # at 4 bits
        [0.141 0.009 0.062 0.071]
    """
    moments, positions, reach = input_moments(
        task, lambda x: torch.einsum("pgc,pgd->gcd", x, x), "salience"
    )

    def price(key: Key) -> NDArray[np.float64]:
        count = task.renderer.weight(key.name).shape[0]
        work = partial(_output_error, moments[key], count)
        errors = map_errors(work, task.renderer, key.name, task.formats)
        return sum((e.double().cpu().numpy() for e in errors), np.zeros(len(task.formats)))

    values = moment_scores(task, moments, reach, price)
    return Scores((values / positions).astype(np.float32), signed=False, in_nats=False)


def _output_error(moment: Tensor, count: int, rows: Rows, errors: Tensor) -> Tensor:
    """``tr(dW H dW')`` for the errors [F, rows, cols] of some of ``count`` rows: [F].

    H is [channel_groups, cols, cols], or one count per row for an embedding.
    """
    if moment.dim() == 1:
        return torch.einsum("frc,frc,r->f", errors, errors, moment[rows])
    if len(moment) == 1:
        return ((errors @ moment[0]) * errors).sum((1, 2))
    group = torch.arange(count, device=errors.device)[rows] // (count // len(moment))
    return torch.einsum("frc,rcd,frd->f", errors, moment[group], errors)

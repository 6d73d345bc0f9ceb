"""Diagonal of the empirical Fisher matrix at the output of every layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..factors import Block, Factors
from ..probes import data_upstream
from . import METRICS, Scores, Task
from ._gradient_scores import gradient_scores
from ._input_moments import require_inputs


@METRICS.register("output_fisher")
def output_fisher(task: Task) -> Scores:
    """Squared error of the layer's output times its gradient: ModelOpt's gradient score.

    A price is ``sum_tr (delta_tr dY_tr)^2`` per token with ``dY = dW x``.

    delta is the gradient at the layer's output from the labels of the text itself.  Cross terms
    between output channels and between tokens are dropped: little noise, and a level that is
    not that of the KL.  One matrix product per format and batch: the cost grows with the formats.

    Returns:
        Non-negative scores [N, U, F], not in nats.

    References:
        NVIDIA Model Optimizer, ``auto_quantize`` (gradient method).

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = output_fisher(task)
        >>> scores.values.shape, scores.in_nats
        ((16, 4, 3), False)
        >>> print(scores.values.mean(0)[:, 1].round(5))  # at 4 bits
        [0.00658 0.00123 0.00226 0.00287]
    """
    require_inputs(task, "output_fisher")
    generator = torch.Generator().manual_seed(task.seed)
    upstream = data_upstream(generator, task.model.is_language_model)
    unlabelled = 1 if task.model.is_language_model else 0
    (scores,), positions = gradient_scores(task, upstream, [output_squared], unlabelled)
    return Scores((scores / positions).astype(np.float32), signed=False, in_nats=False)


def output_squared(block: Block) -> Tensor:
    """[samples, F] for some rows; rows of a grouped convolution see their group's inputs."""
    assert isinstance(block.source, Factors)
    x, delta = block.source.x, block.source.delta
    if isinstance(block.rows, Tensor):
        return _looked_up_squared(block.source, block, block.rows)
    upstream = delta.flatten(2)[:, :, block.rows].square()
    if x.shape[2] == 1:
        changes = (x[:, :, 0] @ errors.T for errors in block.errors)
    else:
        groups = torch.arange(delta[0, 0].numel(), device=x.device) // delta.shape[-1]
        picked = x[:, :, groups[block.rows]]
        changes = (torch.einsum("nprc,rc->npr", picked, errors) for errors in block.errors)
    return torch.stack([(change.square() * upstream).sum((1, 2)) for change in changes], 1)


def _looked_up_squared(source: Factors, block: Block, rows: Tensor) -> Tensor:
    """The same for an embedding, whose output at a token is the token's row."""
    x, upstream = source.x, source.delta[:, :, 0].square()
    where = torch.searchsorted(rows, x).clamp_(max=len(rows) - 1)
    upstream = upstream * (rows[where] == x).unsqueeze(-1)
    return torch.stack(
        [(errors.square()[where] * upstream).sum((1, 2)) for errors in block.errors], 1
    )

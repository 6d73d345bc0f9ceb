"""Layer-output error under the second moment of the activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models import samples_in
from ..probes import check_reached, module_input, positions_in
from ..rendering import Rows, first_input, map_errors
from . import METRICS, Scores, Task


@METRICS.register("salience")
def salience(task: Task) -> Scores:
    """``tr(dW H dW')`` with ``H = E[x x']``: the squared error of the layer's output.

    One forward pass collects H [cols, cols] per matrix (counts per token for an embedding), all
    of which are in memory at once: 4 * cols^2 bytes each. The errors are priced afterwards.
    Blind to what the rest of the network does with the output.

    Returns:
        Scores [1, U, F], squared output error per position; not in nats.

    References:
        Frantar et al. (2023), GPTQ, Eq. 1; Nagel et al. (2020), AdaRound, Sec. 3.
    """
    moments, positions = _second_moments(task)
    values = np.zeros((1, len(task.units), len(task.formats)))
    index = task.unit_index()
    for (name, _), moment in moments.items():
        count = task.renderer.weight(name).shape[0]
        work = partial(_output_error, moment, count)
        for error in map_errors(work, task.renderer, name, task.formats):
            values[0, index[name]] += error.double().cpu().numpy()
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


def _second_moments(task: Task) -> tuple[dict[tuple[str, type], Tensor], int]:
    """Sum of x x' over all positions per matrix and kind of use, and the number of positions."""
    moments: dict[tuple[str, type], Tensor] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Tensor
        ) -> None:
            x = module_input(module, first_input(args, kwargs), samples=1)[0]
            if x.is_floating_point():
                moment = torch.einsum("pgc,pgd->gcd", x, x)
            else:
                vocabulary = task.renderer.weight(name).shape[0]
                moment = torch.bincount(x, minlength=vocabulary).float()
            key = (name, type(module))
            moments[key] = moments[key] + moment if key in moments else moment

        return hook

    handles = [
        module.register_forward_hook(collect(name), with_kwargs=True)
        for name, module in task.renderer.hooked_modules()
    ]
    positions = 0
    try:
        with torch.no_grad():
            for batch in task.samples.batches:
                logits = task.model.logits(batch)
                positions += logits.shape[0] * positions_in(logits)
                task.advance(samples_in(batch))
    finally:
        for handle in handles:
            handle.remove()
    check_reached(task.renderer.names, (name for name, _ in moments))
    return moments, positions

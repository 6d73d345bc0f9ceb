"""Moments of the inputs of every matrix, shared by the metrics of the layer's output error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...models.rendering import first_input
from ...models.workload import samples_in
from ..probes import check_reached, module_input, positions_in
from . import Task


def input_moments(
    task: Task, moment_of: Callable[[Tensor], Tensor]
) -> tuple[dict[tuple[str, type], Tensor], int]:
    """Sum a moment of every matrix's inputs over all positions, in one forward pass.

    Args:
        task: Model, units and samples.
        moment_of: Maps inputs x [positions, channel_groups, cols] to the sum of their moments.

    Returns:
        The moments by matrix and kind of use (a tied matrix has two; an embedding's is how often
        each row is looked up, [rows]), and the number of positions.
    """
    moments: dict[tuple[str, type], Tensor] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Tensor
        ) -> None:
            x = module_input(module, first_input(args, kwargs), samples=1)[0]
            if x.is_floating_point():
                moment = moment_of(x)
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

"""Moments of the inputs of every matrix, shared by the metrics of the layer's output error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.passes import Inputs
from ..experts import Reach
from ..factors import squared
from ..uses import Uses, uses_of
from . import Task


class Key(NamedTuple):
    """A matrix and one kind of its uses: a tied matrix has two."""

    name: str
    site: str


def require_inputs(task: Task, metric: str) -> Uses:
    """How weights are used, if each is a product with inputs.

    Raises:
        ValueError: Names the first that is not.
    """
    uses = uses_of(task.model, task.renderer, task.samples.batches)
    for name, place in uses.by_autograd.items():
        kind = type(place.module).__name__
        raise ValueError(
            f"{metric} looks at what a layer multiplies its weight by, and {name!r} (in a {kind}) "
            f"is not used like that alone. Take --metric fisher, or leave out the "
            f"{len(uses.by_autograd)} such weights, with --exclude {name!r} and the like."
        )
    return uses


def input_moments(
    task: Task, moment_of: Callable[[Tensor], Tensor], metric: str = "This metric"
) -> tuple[dict[Key, Tensor], int, Reach]:
    """Sum a moment of every matrix's inputs over all positions, in one forward pass.

    Args:
        task: Model, units and samples.
        moment_of: Maps inputs x [positions, channel_groups, cols] to the sum of their squares.
        metric: Who asks, for the message.

    Returns:
        The moments by matrix and kind of use (an embedding's is how often each row is looked up,
        [rows]), the number of positions, and which experts were reached.

    Raises:
        ValueError: If a weight is not a factor of a product with inputs.
    """
    uses = require_inputs(task, metric)
    moments: dict[Key, Tensor] = {}
    reach = Reach(task.renderer, uses)

    def collect(inputs: Inputs) -> None:
        x = inputs.x.flatten(0, 1)
        if not len(x):  # an expert that no token was sent to
            return
        if x.is_floating_point():
            moment = moment_of(x)
        else:
            vocabulary = task.renderer.weight(inputs.name).shape[0]
            moment = torch.bincount(x, minlength=vocabulary).float()
        if inputs.scale != 1:
            moment = inputs.scale**2 * moment
        key = Key(inputs.name, inputs.kind)
        moments[key] = moments[key] + moment if key in moments else moment
        reach.saw_all(inputs.name)

    positions = int(task.passes.forward(collect, task.advance).sum())
    return moments, positions, reach


def moment_scores(
    task: Task, moments: dict[Key, Tensor], reach: Reach, price: Callable[[Key], Any]
) -> NDArray[np.float64]:
    """Prices [1, U, F] from the moments of every matrix, experts without tokens included.

    Args:
        task: Model, units and formats.
        moments: From :func:`input_moments`.
        reach: From :func:`input_moments`.
        price: Maps a matrix and kind of use to its prices [F].
    """
    values = np.zeros((1, len(task.units), len(task.formats)))
    index = task.unit_index()
    for key in moments:
        values[0, index[key.name]] += price(key)
    task.unreached.extend(reach.extend(values[None], [squared], task.units, task.formats))
    return values

"""Per-sample inner products with the rendering errors, shared by the gradient metrics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..models import samples_in
from ..probes import Factors, Upstream, inner_products, positions_in, stream
from . import Task


def gradient_scores(task: Task, upstream: Upstream, squared: bool = False) -> NDArray[np.float32]:
    """Scores of all samples, units and formats from one forward + backward pass per batch.

    Args:
        task: Model, units, formats and samples.
        upstream: The gradient at the logits.
        squared: Sum of G^2 * dW^2 instead of the inner product <G, dW>.

    Returns:
        float32 [N, U, F], normalized to sqrt(nats per token): <G, dW> / sqrt(2 T), or, when
        ``squared``, to nats per token: sum(G^2 dW^2) / (2 T).
    """
    index = task.unit_index()
    scores = np.zeros((task.samples.count, len(task.units), len(task.formats)))
    start = 0
    for batch in task.samples.batches:
        count = samples_in(batch)
        rows = scores[start : start + count]

        def visit(name: str, factors: Factors, rows: NDArray[np.float64] = rows) -> None:
            rows[:, index[name]] += inner_products(
                factors, task.renderer, name, task.formats, squared
            )

        logits = stream(task.model, task.renderer, batch, upstream, visit)
        positions = positions_in(logits)
        rows /= 2 * positions if squared else np.sqrt(2 * positions)
        start += count
        task.advance(count)
    return scores.astype(np.float32)

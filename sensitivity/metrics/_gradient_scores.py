"""Per-sample inner products with the rendering errors, shared by the gradient metrics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..models import samples_in
from ..probes import Factors, Upstream, check_reached, inner_products, positions_in, stream
from . import Task


def gradient_scores(
    task: Task, upstream: Upstream, squared: bool = False, unlabelled: int = 0
) -> NDArray[np.float32]:
    """Scores of all samples, units and formats from one forward + backward pass per batch.

    Args:
        task: Model, units, formats and samples.
        upstream: The gradient at the logits.
        squared: Sum of G^2 * dW^2 instead of the inner product <G, dW>.
        unlabelled: Positions per sample at which the upstream gradient is always zero.

    Returns:
        float32 [N, U, F], normalized to sqrt(nats per token): <G, dW> / sqrt(2 T), or, when
        ``squared``, to nats per token: sum(G^2 dW^2) / (2 T).

    Raises:
        ValueError: If a unit never influences the output, or a gradient is not finite.
    """
    index = task.unit_index()
    scores = np.zeros((task.samples.count, len(task.units), len(task.formats)))
    reached: set[str] = set()
    start = 0
    for batch in task.samples.batches:
        count = samples_in(batch)
        rows = scores[start : start + count]

        def visit(name: str, factors: Factors, rows: NDArray[np.float64] = rows) -> None:
            products = inner_products(factors, task.renderer, name, task.formats, squared)
            if not np.isfinite(products).all():
                raise ValueError(
                    f"The gradient of {name!r} is NaN or Inf on a calibration batch. Check the "
                    f"model there, or leave it out with --exclude {name!r}."
                )
            reached.add(name)
            rows[:, index[name]] += products

        logits = stream(task.model, task.renderer, batch, upstream, visit)
        positions = positions_in(logits) - unlabelled
        rows /= 2 * positions if squared else np.sqrt(2 * positions)
        start += count
        task.advance(count)
    check_reached(task.renderer.names, reached)
    return scores.astype(np.float32)

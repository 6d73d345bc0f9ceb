"""Per-sample products with the rendering errors, shared by the gradient metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..._base.memory import give_back
from ...models.passes import Upstream
from ..experts import Reach
from ..factors import Gradient, Product, gradient_products
from ..uses import uses_of
from . import Task

# Weights priced between two times that freed memory goes back: blocks of all sizes come and go
# among codes that stay, and what lies between those would add up over a pass.
GIVE_BACK_AFTER = 1 << 24


def gradient_scores(
    task: Task, upstream: Upstream, products: Sequence[Product], unlabelled: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Products of all samples, units and formats from one forward + backward pass per batch.

    Args:
        task: Model, units, formats and samples.
        upstream: The gradient at the logits.
        products: The P products of gradients and errors, such as :func:`..probes.inner`.
        unlabelled: Positions per sample at which the upstream gradient is always zero.

    Returns:
        float64 [P, N, U, F], sums over the positions of a sample, and float64 [N, 1, 1], the
        labelled positions T of every sample.

    Raises:
        ValueError: If a unit never influences the output, or a gradient is not finite.
    """
    index = task.unit_index()
    shape = (len(products), task.samples.count, len(task.units), len(task.formats))
    scores = np.zeros(shape)
    uses = uses_of(task.model, task.renderer, task.samples.batches)
    reach = Reach(task.renderer, uses)

    freed_after = 0  # weights

    def visit(name: str, source: Gradient, samples: range) -> None:
        nonlocal freed_after
        found = gradient_products(source, task.renderer, name, task.formats, products)
        if not np.isfinite(found).all():
            raise ValueError(
                f"The gradient of {name!r} is NaN or Inf on a calibration batch. Check the "
                f"model there, or leave it out with --exclude {name!r}."
            )
        reach.saw(name, source)
        scores[:, samples.start : samples.stop, index[name]] += found
        freed_after += task.renderer.weight(name).numel()
        if freed_after >= GIVE_BACK_AFTER:
            freed_after = 0
            give_back()

    positions = task.passes.backward((upstream, visit), advance=task.advance)
    task.unreached.extend(reach.extend(scores, products, task.units, task.formats))
    return scores, (positions - unlabelled)[:, None, None].astype(np.float64)

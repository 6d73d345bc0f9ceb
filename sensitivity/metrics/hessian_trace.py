"""Hutchinson trace of the Hessian times the squared weight error (HAWQ-V2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...models.rendering import rows_of
from ...models.workload import Batch, samples_in
from ..errors import squared_errors
from ..experts import Reach
from ..factors import DenseGradient, squared
from ..uses import uses_of
from . import METRICS, Scores, Task

_PROBE_SAMPLES = 2  # samples per probe: double backward keeps the whole graph of each


@METRICS.register("hessian_trace", reads="products")
def hessian_trace(task: Task) -> Scores:
    r"""Squared error times the mean curvature of its matrix, by Hutchinson's probe (HAWQ-V2).

    A price is ``tr(H_u) / (2 D_u) * ||dW_uf||^2``.

    H is the Hessian of KL(p_original || p_W) per token at the original weights, where it equals
    the Fisher matrix. One probe draws Rademacher signs v for all units at once: ``v_u' (H v)_u``
    is unbiased for ``tr(H_uu)``, as the off-diagonal blocks vanish in expectation. Each pair of
    samples gets its own probe, so the scores carry a standard error. Assumes the curvature of a
    unit is isotropic; needs weight-sized vectors for all units at once.

    Returns:
        Scores [probes, U, F] in nats per token under the isotropic assumption.

    References:
        Hutchinson (1989); Dong et al. (2020), HAWQ-V2, Sec. 3.2.

    Example:
        >>> from bitplan.testing import toy_task
        >>> task = toy_task()  # an embedding, a convolution and an MLP, at 2, 4 and 8 bits
        >>> scores = hessian_trace(task)
        >>> scores.values.shape, scores.in_nats
        ((8, 4, 3), True)
        >>> print(scores.values.mean(0)[:, 1].round(5))  # at 4 bits
        [0.00301 0.00072 0.00116 0.00144]
    """
    uses = uses_of(task.model, task.renderer, task.samples.batches)
    reach, index = Reach(task.renderer, uses), task.unit_index()
    places = {matrix: used[0] for matrix, used in task.renderer.places()}
    names = [part.name for matrix in places for part in task.renderer.parts_of(matrix)]
    parameters = [place.parameter for place in places.values()]
    generator = torch.Generator().manual_seed(task.seed)
    traces: list[NDArray[np.float64]] = []

    def of_parts(products: Sequence[Tensor | None]) -> NDArray[np.float64]:
        found = []
        for (matrix, place), product in zip(places.items(), products, strict=True):
            for part in task.renderer.parts_of(matrix):
                if product is None:
                    found.append(0.0)
                    continue
                some = product if part.rows is None else rows_of(place.matrix(product), part)
                found.append(some.sum().item())
                if place.site.stacked and part.rows is None:
                    reach.saw(part.name, DenseGradient(place.matrix(product), place.blocks))
                elif part.name not in uses.experts or some.any():
                    reach.saw_all(part.name)
        return np.array(found)

    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for batch in task.samples.batches:
            for part in _parts(batch):
                traces.append(of_parts(_probe(task, part, parameters, generator)))
                task.advance(samples_in(part))
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    values = np.zeros((len(traces), len(task.units), len(task.formats)))
    for i, name in enumerate(names):
        rows, cols = task.renderer.parts[name].shape
        errors = squared_errors(task.renderer, name, task.formats) / (2 * rows * cols)
        values[:, index[name]] += np.array([trace[i] for trace in traces])[:, None] * errors
    task.unreached.extend(reach.extend(values[None], [squared], task.units, task.formats))
    return Scores(values.astype(np.float32), signed=False, in_nats=True)


def _parts(batch: Batch) -> list[Batch]:
    if isinstance(batch, Tensor):
        return list(batch.split(_PROBE_SAMPLES))
    return [batch]


def _probe(
    task: Task, batch: Batch, parameters: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor | None]:
    """``v_u * (H v)_u`` of every parameter for one draw of signs; None if it is not used."""
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # flash has no double backward
        log_q = nn.functional.log_softmax(task.model.logits(batch), dim=-1)
        p = log_q.detach().exp()
        tokens = log_q.shape[0] * log_q.shape[1]
        kl = (p * (log_q.detach() - log_q)).sum() / tokens
        gradients = torch.autograd.grad(kl, parameters, create_graph=True, allow_unused=True)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        signs = [
            (torch.randint(0, 2, p.shape, generator=generator).float() * 2 - 1).to(p.device)
            for p in parameters
        ]
        products = torch.autograd.grad(
            [gradients[i] for i in used],
            [parameters[i] for i in used],
            grad_outputs=[signs[i] for i in used],
        )
    found: list[Tensor | None] = [None] * len(parameters)
    for i, product in zip(used, products, strict=True):
        found[i] = signs[i] * product
    return found

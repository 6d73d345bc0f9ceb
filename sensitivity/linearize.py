"""The KL divergence around a quantized model: its gradient and curvature, per sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._base.memory import give_back
from ..models.rendering import Renderer
from ..models.samples import Samples
from ..models.units import UnitInfo
from ..models.workload import LoadedModel, samples_in
from ..quantizers.format import Format
from ..quantizers.store import Rows
from .errors import map_errors
from .experts import Reach
from .factors import Block, DenseGradient, Gradient, inner, squared
from .probes import kl_upstream, label_upstream, positions_in, stream
from .uses import uses_of


@dataclass(frozen=True, slots=True)
class Linearization:
    """What a change of one unit does to KL(p_original || p_plan), per calibration sequence.

    For unit u moving from its format c in the plan to f, with ``D = W_f - W_c``:

    Attributes:
        first: float32 [N, U, F], ``<g_u, D>`` with g the exact gradient of the KL of the quantized
            model; nats per token, 0 in the column of c.
        second: float32 [N, U, F], ``<G_u, D> / sqrt(2 T)`` with G the Fisher probe of the
            quantized model: ``mean(second**2)`` estimates ``D' F D / 2``; sqrt(nats per token).
        diagonal: float64 [U, F], ``E[sum G_u^2 D^2] / (2 T)``: the diagonal's share of the same
            form, with far less noise; nats per token.
    """

    first: NDArray[np.float32]
    second: NDArray[np.float32]
    diagonal: NDArray[np.float64]


def linearize(
    model: LoadedModel,
    renderer: Renderer,
    units: Sequence[UnitInfo],
    formats: Sequence[Format],
    choice: NDArray[np.intp],
    samples: Samples,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Linearization:
    """Price every change of one unit of a plan, to second order, at the plan's own weights.

    One forward pass of the original for p, one of the quantized model and two backward passes
    through it: from ``q - p``, the exact gradient of the KL, and from ``q - onehot(y)``, y ~ q,
    the Fisher probe of the quantized model.  The Gauss-Newton form at the original weights prices
    only the distance from the original; here errors already made, and how they line up with
    further ones, are part of the gradient.

    Args:
        model: The original model.
        renderer: Renders the units' matrices.
        units: The U units.
        formats: The F formats.
        choice: intp [U], the plan.
        samples: The N calibration sequences.
        seed: Seed of the sampled labels.
        advance: Called with a number of finished sequences.

    Raises:
        ValueError: If a unit takes no part in the output.

    References:
        Nocedal and Wright (2006), Numerical Optimization, ch. 18 (sequential quadratic
        programming); Martens (2020) for the Gauss-Newton form.
    """
    index = {name: i for i, unit in enumerate(units) for name in unit.modules}
    assignment = {name: formats[int(choice[u])] for name, u in index.items()}
    shape = (samples.count, len(units), len(formats))
    first, second = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    diagonal = np.zeros(shape[1:])
    generator = torch.Generator().manual_seed(seed)
    start = 0
    uses = uses_of(model, renderer, samples.batches)
    reach = Reach(renderer, uses)
    for batch in uses.pieces(samples.batches):
        block = slice(start, start + samples_in(batch))
        with torch.no_grad():
            log_p = model.logits(batch).log_softmax(-1)
        found = np.zeros((3, block.stop - block.start, *shape[1:]))
        # Of the first backward pass, for the second; a dense gradient is used at once.
        waiting: dict[str, list[Gradient]] = {}

        def keep(
            name: str,
            kl: Gradient,
            waiting: dict[str, list[Gradient]] = waiting,
            found: NDArray[np.float64] = found,
        ) -> None:
            if isinstance(kl, DenseGradient):
                u = index[name]
                found[:, :, u] += _products(kl, None, renderer, name, formats, int(choice[u]))
            else:
                waiting.setdefault(name, []).append(kl)

        def price(
            name: str,
            fisher: Gradient,
            waiting: dict[str, list[Gradient]] = waiting,
            found: NDArray[np.float64] = found,
        ) -> None:
            reach.saw(name, fisher)
            # A module used twice comes in the same order again.
            kl = waiting[name].pop(0) if waiting.get(name) else None
            u = index[name]
            found[:, :, u] += _products(kl, fisher, renderer, name, formats, int(choice[u]))

        with renderer.applied(assignment):
            passes = ((kl_upstream(log_p), keep), (label_upstream(generator), price))
            # No name for the logits: these would stay in memory during the next batch.
            positions = positions_in(stream(model, renderer, batch, *passes))
        first[block] = found[0] / positions
        second[block] = found[1] / np.sqrt(2 * positions)
        diagonal += found[2].sum(axis=0) / (2 * positions)
        start = block.stop
        give_back()
        advance(block.stop - block.start)
    diagonals = diagonal[None, None] / samples.count
    reach.extend(diagonals, [squared], units, formats)
    probes = second[None].astype(np.float64)
    reach.extend(probes, [inner], units, formats)
    same = np.arange(len(units))
    diagonals[0, 0, same, choice] = probes[0][:, same, choice] = 0  # no change, no price
    return Linearization(first, probes[0].astype(np.float32), diagonals[0, 0])


def _products(
    kl: Gradient | None,
    fisher: Gradient | None,
    renderer: Renderer,
    name: str,
    formats: Sequence[Format],
    current: int,
) -> NDArray[np.float64]:
    """Products of both gradients with the changes from one format to all: [3, samples, F].

    What is made of a gradient that is not given is zero.
    """
    source = kl or fisher
    assert source is not None

    def work(rows: Rows, errors: Tensor) -> NDArray[np.float64]:
        errors -= errors[current].clone()
        found = np.zeros((3, source.samples, len(formats)))
        if kl is not None:
            found[0] = inner(Block(kl, rows, errors)).double().cpu().numpy()
        if fisher is not None:
            probe = Block(fisher, rows, errors)
            found[1] = inner(probe).double().cpu().numpy()
            found[2] = squared(probe).double().cpu().numpy()
        return found

    blocks = map_errors(work, renderer, name, formats, source.touched_rows())
    return sum(blocks, np.zeros((3, source.samples, len(formats))))

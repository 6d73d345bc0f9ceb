"""Scale tuning: the scales of a quantized model move down the slope of its KL to the original.

Codes, zero points and bytes stay, so whatever stores or runs the plan does so with tuned scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..models.rendering import Assignment, Renderer
from ..models.samples import Samples
from ..models.workload import Batch, LoadedModel, samples_in, take
from ..quantizers.format import Format
from ..quantizers.lines import Grid, row_chunks
from ..quantizers.packed import PackedTensor
from ..quantizers.scales import float_fields, log_slopes, rescaled, scales_of, with_fields
from ..quantizers.store import Rows
from .factors import Gradient
from .probes import kl_upstream, positions_in, stream
from .uses import uses_of

RATES = (1e-4, 2e-3)  # least and most, of the logarithms of scales
TRIED = 2  # steps' sequences that a direction is made from, and as many that it is tried out on
REACH = 1e-3  # of a step tried out: float16 tells apart what differs by 5e-4
WARM_UP = 5  # steps until the rate is reached
TOKENS = 512  # per step
MOST_SAMPLES = 32  # per step, of inputs with few positions
BETAS = (0.9, 0.99)  # decay of the mean slope, and of its mean square
EPSILON = 1e-12  # nats per token; slopes are 1e-7 to 1e-3
REVISION = 2  # raised when other scales come of the same question

Slopes = dict[str, Tensor]  # by "matrix.field", such as "model.layers.0.mlp.up_proj.scale"


@dataclass(slots=True)
class _Scale:
    """One field of scales under Adam, all float32 and of one shape."""

    value: Tensor
    mean: Tensor
    square: Tensor


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix whose codes stay."""

    fmt: Format
    packed: PackedTensor
    grid: Grid
    scales: Mapping[str, _Scale]

    def stored(self) -> Grid:
        """The grid with the scales as they are, rounded as they would be stored."""
        return with_fields(self.grid, self.values())

    def values(self) -> dict[str, Tensor]:
        """The scales as they are, by field."""
        return {field: scale.value for field, scale in self.scales.items()}


class Tuner:
    """Tunes the scales of a plan by the KL divergence of the quantized model from the original.

    With the weights ``Q = s level(c) + o`` of a group and the gradient G of the mean KL with
    respect to them, the slope in ``u = log s`` is ``sum_j G_j (Q_j - o)``: Adam goes down in u, so
    steps are relative and signs stay.  Scales are float32 between steps; the model always runs with
    them as they would be stored, float16, so what is measured at any time is what would ship.

    It holds the packed codes of the plan, and float32 scales with Adam's two moments; the weights
    themselves are made when they are read.

    Args:
        model: The original model.
        renderer: Renders the plan before tuning.
        assignment: The plan.
        samples: Calibration sequences: about TOKENS tokens of them in each step, every sequence
            once before any comes twice.
        steps: How many steps there will be: the rate rises for WARM_UP steps, and falls to zero by
            the end, as half a cosine.
        seed: Draws the order of the sequences.

    Attributes:
        renderer: Renders the plan with the scales as they are.
        taken: Steps taken so far.
        rate: Of the logarithms of scales, at its highest; :meth:`try_out` finds one.

    References:
        The distilled weight quantization (DWQ) of mlx-lm; Chen et al. (2024), "EfficientQAT",
        which trains scales alone in its second phase; Kingma and Ba (2015), "Adam".
    """

    def __init__(
        self,
        model: LoadedModel,
        renderer: Renderer,
        assignment: Assignment,
        samples: Samples,
        *,
        steps: int,
        seed: int = 0,
    ) -> None:
        self._model, self._assignment, self._samples = model, assignment, samples
        self._steps, self._seed, self.taken, self.rate = steps, seed, 0, max(RATES)
        self.renderer = renderer.overlay()
        self._matrices: dict[str, _Matrix] = {}
        renderer.store.complete(assignment.items())
        for name, fmt in assignment.items():
            packed = renderer.store.packed(name, fmt)
            scales = {field: _adam(part) for field, part in scales_of(packed).items()}
            grid = packed.grid()
            if scales and grid is not None:
                self._matrices[name] = _Matrix(fmt, packed, grid, scales)
                self.renderer.store.put(name, fmt, packed)
        self._places = [(batch, i) for batch in samples.batches for i in range(samples_in(batch))]
        self._most = max(samples_in(batch) for batch in samples.batches)
        self._per_step = self._samples_per_step()

    @property
    def count(self) -> int:
        """Number of scales that are tuned."""
        return sum(scale.value.numel() for _, scale in self._scales())

    @property
    def tokens(self) -> int:
        """Positions that a step looks at, about: sequences times the length of one."""
        return self._per_step * self._positions

    def try_out(self) -> float:
        """Set the rate to the length of the best first step, and go nowhere.

        The first step of Adam moves every scale by the rate, whatever the size of its slope: by d,
        plus or minus one, against the sign of the slope on some sequences.  Much of that is noise,
        and along such a step the KL of a deep model soon rises, all the sooner the finer the plan.
        With the slopes g on other sequences, here and after a step of REACH, it is least after ::

            -g'd / ((g_ahead - g)'d / REACH)

        Returns:
            The rate, within RATES.
        """
        some, others = self._draw(0, TRIED), self._draw(TRIED, 2 * TRIED)
        away = {key: slope.sign().neg_() for key, slope in self.slopes(some).items()}
        start = {key: scale.value.clone() for key, scale in self._scales()}
        here = _along(self.slopes(others), away)
        for key, scale in self._scales():
            scale.value.mul_((REACH * away[key]).exp_())
        self._show()
        curvature = (_along(self.slopes(others), away) - here) / REACH
        for key, scale in self._scales():
            scale.value.copy_(start[key])
        self._show()
        least, most = RATES
        best = most if curvature <= 0 else -here / curvature
        self.rate = min(max(best, least), most)
        return self.rate

    def step(self) -> None:
        """Take one step of Adam on the next sequences."""
        slopes = self.slopes(self._draw(self.taken, self.taken + 1))
        rate = self.rate * (1 + math.cos(math.pi * self.taken / self._steps)) / 2
        self.taken += 1
        rate *= min(self.taken / WARM_UP, 1)
        decay, decay_square = BETAS
        for key, scale in self._scales():
            slope = slopes[key]
            scale.mean.lerp_(slope, 1 - decay)
            scale.square.mul_(decay_square).addcmul_(slope, slope, value=1 - decay_square)
            mean = scale.mean / (1 - decay**self.taken)
            square = scale.square / (1 - decay_square**self.taken)
            scale.value.mul_(mean.div_(square.sqrt_().add_(EPSILON)).mul_(-rate).exp_())
        self._show()

    def slopes(self, batches: Sequence[Batch]) -> Slopes:
        """Slopes of the KL in the logarithms of all scales.

        Args:
            batches: Model inputs.

        Returns:
            By ``matrix.field``, nats per token: float32, shaped like the scales.

        Raises:
            ValueError: If a model gives NaN or Inf.
        """
        sums = {key: torch.zeros_like(scale.value) for key, scale in self._scales()}
        uses = uses_of(self._model, self.renderer, self._samples.batches)
        positions = 0

        def add(name: str, gradient: Gradient) -> None:
            if name in self._matrices:
                self._add(name, gradient.pooled(), sums)

        for batch in uses.pieces(batches):
            with torch.no_grad():
                log_p = self._model.logits(batch).log_softmax(-1)
            with self.renderer.applied(self._assignment):
                passed = (kl_upstream(log_p), add)
                positions += samples_in(batch) * positions_in(
                    stream(self._model, self.renderer, batch, passed)
                )
        return {key: total.div_(positions) for key, total in sums.items()}

    def scales(self) -> dict[str, Tensor]:
        """The scales as they would be stored, float16, by ``matrix.field``."""
        return {
            f"{name}.{field}": part
            for name, matrix in self._matrices.items()
            for field, part in float_fields(matrix.stored()).items()
        }

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on, besides arguments, rate and number of steps."""
        parts = ("value", "mean", "square")
        return {f"{key}.{part}": getattr(s, part) for key, s in self._scales() for part in parts}

    def restore(self, state: Mapping[str, Tensor], taken: int) -> None:
        """Go on from a :meth:`state` after so many steps.

        Raises:
            ValueError: If it is that of other matrices.
        """
        ours = {key: part.shape for key, part in self.state().items()}
        if ours != {key: part.shape for key, part in state.items()}:
            raise ValueError("The state is that of other scales than those to be tuned.")
        for key, part in self.state().items():
            part.copy_(state[key])
        self.taken = taken
        self._show()

    def _scales(self) -> Iterator[tuple[str, _Scale]]:
        for name, matrix in self._matrices.items():
            for field, scale in matrix.scales.items():
                yield f"{name}.{field}", scale

    def _show(self) -> None:
        """Let the renderer have the scales as they are."""
        for name, matrix in self._matrices.items():
            packed = rescaled(matrix.packed, matrix.values(), matrix.grid)
            self.renderer.store.put(name, matrix.fmt, packed)

    def _add(self, name: str, gradient: Gradient, sums: Slopes) -> None:
        """Add a matrix's slopes, from some rows of its gradient at a time."""
        matrix = self._matrices[name]
        packed, grid = self.renderer.store.packed(name, matrix.fmt), matrix.stored()
        for rows in _rows(gradient, packed.shape):
            for field, part in log_slopes(packed, grid, gradient.gradient(rows)[0], rows).items():
                total = sums[f"{name}.{field}"]
                if len(total) == 1:  # one scale for all rows, or one row
                    total += part
                else:
                    total[rows] += part

    def _samples_per_step(self) -> int:
        batch, i = self._places[0]
        self._positions = self._samples.length or positions_in(
            self._model.logits(take(batch, i, i + 1)).detach()
        )
        return min(math.ceil(TOKENS / self._positions), MOST_SAMPLES, len(self._places))

    def _draw(self, step: int, stop: int) -> list[Batch]:
        """The samples of some steps, in batches no larger than those they come from."""
        count = len(self._places)
        chosen: list[Batch] = []
        for i in range(step * self._per_step, stop * self._per_step):
            order = np.random.default_rng([self._seed, i // count]).permutation(count)
            batch, place = self._places[order[i % count]]
            chosen.append(take(batch, place, place + 1))
        tensors = [sample for sample in chosen if isinstance(sample, Tensor)]
        if len(tensors) == len(chosen) and len({(t.shape, t.dtype) for t in tensors}) == 1:
            return list(torch.cat(tensors).split(self._most))
        return chosen


def _adam(scale: Tensor) -> _Scale:
    value = scale.float().clone()
    return _Scale(value, torch.zeros_like(value), torch.zeros_like(value))


def _along(slopes: Slopes, direction: Slopes) -> float:
    """The slope along a direction."""
    return sum(float((slope * direction[key]).sum()) for key, slope in slopes.items())


def _rows(gradient: Gradient, shape: tuple[int, int]) -> Iterator[Rows]:
    """The rows that have a gradient, some at a time."""
    touched = gradient.touched_rows()
    for rows in row_chunks(shape if touched is None else (len(touched), shape[1])):
        yield rows if touched is None else touched[rows]

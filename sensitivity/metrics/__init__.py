"""Sensitivity metrics: what a rendering error costs, one file per published score.

A metric says of itself, as a trait of its registration:

``reads``
    What it takes of the model: ``"weights"`` alone, ``"inputs"`` of layers in a forward pass,
    ``"gradients"`` in a backward pass, too (the default), or ``"products"`` of the Hessian and
    vectors, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..._base.registry import Registry
from ...models.units import UnitInfo
from ...quantizers.format import Format

if TYPE_CHECKING:  # so that the names of metrics can be listed without torch
    from ...models.passes import Pass
    from ...models.rendering import Renderer
    from ...models.samples import Samples
    from ...models.workload import LoadedModel
    from ..factors import Gradient


@dataclass(frozen=True, slots=True)
class Task:
    """Everything a metric may look at.

    Attributes:
        model: The original model.
        units: The U units.
        formats: The F candidate formats.
        renderer: Renders their matrices.
        samples: Calibration batches.
        seed: Seed of every random draw.
        advance: Called with a number of finished samples, for the progress bar.
        unreached: Filled by the metric with the experts that no sample reached, whose price is
            that of their kind.
    """

    model: LoadedModel
    units: Sequence[UnitInfo]
    formats: Sequence[Format]
    renderer: Renderer
    samples: Samples
    seed: int
    advance: Callable[[int], None]
    unreached: list[str] = field(default_factory=list)

    @property
    def passes(self) -> Pass[Gradient]:
        """Takes the samples through the model and shows inputs and gradients."""
        from ..reading import passes_for

        return passes_for(self.model, self.renderer, self.units, self.samples)

    def unit_index(self) -> dict[str, int]:
        """Canonical module name -> index of its unit."""
        return {name: i for i, unit in enumerate(self.units) for name in unit.modules}


@dataclass(frozen=True, slots=True)
class Scores:
    """What a metric returns.

    Attributes:
        values: [N, U, F] one value per sample, or [1, U, F] for a metric without samples.
        signed: Whether a price is the mean of ``values**2`` (an inner product per sample) or
            the mean of ``values``.
        in_nats: Whether prices are nats per token of KL. If not, a scale is fitted to a few
            measured plans before the table is used.
        diagonal: [U, F], a smooth shape, nats per token, that prices from signed ``values`` are
            shrunk toward; None to take the values as they are.
    """

    values: NDArray[np.float32]
    signed: bool
    in_nats: bool
    diagonal: NDArray[np.float64] | None = None


Metric = Callable[[Task], Scores]
METRICS: Registry[Metric] = Registry("metric", __name__)

"""Passes of a model in memory that read the factors of every weight gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from ..models.passes import Pass, Upstream, Watched, WholePass
from ..models.rendering import Renderer
from ..models.samples import Samples
from ..models.units import UnitInfo
from ..models.workload import Batch, LoadedModel
from .probes import Factors, module_input, stream


class FactorReader:
    """Reads inputs from every module of a unit, and gradients from the stream of factors.

    Args:
        model: The model.
        renderer: Says which modules are units.
    """

    def __init__(self, model: LoadedModel, renderer: Renderer) -> None:
        self._model, self._renderer = model, renderer

    def watched(self) -> Iterator[Watched]:
        """Every module of a unit; tied ones under one name."""
        for name, module in self._renderer.hooked_modules():
            yield Watched(name, module, partial(module_input, module))

    def pieces(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches as they are."""
        return batches

    def stream(
        self, batch: Batch, *probes: tuple[Upstream, Callable[[str, Factors], None]]
    ) -> Tensor:
        """See :func:`.probes.stream`."""
        return stream(self._model, self._renderer, batch, *probes)


def whole_pass(
    model: LoadedModel, renderer: Renderer, units: Sequence[UnitInfo], samples: Samples
) -> Pass[Factors]:
    """A pass over samples with the whole model in memory."""
    return WholePass(model, renderer, units, samples, FactorReader(model, renderer))

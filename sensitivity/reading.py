"""Passes of a model that read inputs by their sites and gradients from the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from ..models.blockwise import BlockwisePass
from ..models.passes import Pass, Upstream
from ..models.rendering import Renderer
from ..models.samples import Samples
from ..models.streamed import is_streamed
from ..models.units import UnitInfo
from ..models.whole import Watched, WholePass
from ..models.workload import Batch, LoadedModel
from .factors import Gradient
from .probes import stream
from .uses import Uses, uses_of


class UsesReader:
    """Reads a model as :func:`.uses.uses_of` has found that it uses its weights.

    Args:
        model: The model.
        renderer: Knows the units.
        samples: The inputs.
    """

    def __init__(self, model: LoadedModel, renderer: Renderer, samples: Samples) -> None:
        self._model, self._renderer, self._samples = model, renderer, samples

    def watched(self) -> Iterator[Watched]:
        """The modules of all weights that are products with inputs."""
        uses = self._uses()
        for use in uses.by_factors:
            place = use.place
            read = partial(place.site.inputs, place.module)
            divides = not uses.singly
            yield Watched(use.matrix, place.site_name, place.module, read, use.scale, divides)

    def pieces(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """See :meth:`.uses.Uses.pieces`."""
        return self._uses().pieces(batches)

    def stream(
        self,
        batch: Batch,
        *probes: tuple[Upstream, Callable[[str, Gradient], None]],
        run: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """See :func:`.probes.stream`."""
        return stream(self._model, self._renderer, batch, *probes, run=run)

    def _uses(self) -> Uses:
        return uses_of(self._model, self._renderer, self._samples.batches)


def passes_for(
    model: LoadedModel, renderer: Renderer, units: Sequence[UnitInfo], samples: Samples
) -> WholePass[Gradient]:
    """A pass over samples: block by block through a model whose weights stay in its files."""
    if is_streamed(model.module):
        reader = UsesReader(model, renderer, samples)
        return BlockwisePass(model, renderer, units, samples, reader)
    return WholePass(model, renderer, units, samples, UsesReader(model, renderer, samples))


def whole_pass(
    model: LoadedModel, renderer: Renderer, units: Sequence[UnitInfo], samples: Samples
) -> Pass[Gradient]:
    """A pass over samples with the whole model in memory."""
    return WholePass(model, renderer, units, samples, UsesReader(model, renderer, samples))

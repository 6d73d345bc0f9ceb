"""What rounding methods need to know of a model's data: second moments of what matrices multiply.

They come from forward passes of the original model over the calibration sequences, for as many
matrices at a time as there is room for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .._base.progress import Advance, Reporter
from ..models.identity import definition_sha256
from ..models.rendering import Renderer
from ..models.samples import Samples
from ..models.sites import Place
from ..models.units import UnitInfo
from ..models.workload import Batch, LoadedModel, samples_in, take
from ..quantizers.methods import METHODS, Evidence
from .shared_inputs import (
    SharedInput,
    cut_again,
    in_rounds,
    shared_inputs,
    vectors,
    watch_inputs,
)
from .statistics import Statistics
from .uses import uses_of

LIMIT = 1 << 31  # bytes of second moments and their factors at a time
TOKENS = 1024  # per forward pass of a language model, whatever --batch-tokens: sums stay the same


@dataclass(frozen=True, slots=True)
class Seen:
    """Rounding sequences that are made when they are needed.

    Attributes:
        samples: Makes them.
        sha256: Their hash.
        seed: Their seed, and that of labels that are sampled for them.
    """

    samples: Callable[[], Samples]
    sha256: str
    seed: int

    @classmethod
    def of(cls, samples: Samples) -> Seen:
        """Sequences that are there."""
        return cls(lambda: samples, samples.sha256, samples.seed)


def calibrated(
    model: LoadedModel,
    units: Sequence[UnitInfo],
    rounding: str,
    seen: Seen | Samples | None,
    *,
    model_sha256: str,
    folder: Path | None = None,
    statistics: Path | None = None,
    reporter: Reporter | None = None,
) -> Renderer:
    """A renderer whose rounding method has the evidence it needs.

    Args:
        model: The original model.
        units: Its units.
        rounding: Name of the rounding method.
        seen: The rounding sequences, or how to make them; None for a method that needs no data.
        model_sha256: Hash of the model's weights.
        folder: Where codes are kept that cannot be recomputed, for later runs, too.
        statistics: Where sums over the rounding sequences are kept; None for a temporary folder.
        reporter: Where progress is shown.
    """
    renderer = Renderer(model.module, units, rounding, folder)
    if needs := METHODS.trait(rounding, "needs"):
        assert seen is not None, f"{rounding} needs data"
        if isinstance(seen, Samples):
            seen = Seen.of(seen)
        samples = seen.samples
        parts = (model_sha256, definition_sha256(model), seen.sha256)
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        if "fisher" in needs:
            renderer.store.evidence = Statistics(
                model,
                units,
                renderer,
                samples,
                key,
                seed=seen.seed,
                folder=statistics,
                reporter=reporter,
            )
        else:
            renderer.store.evidence = Moments(model, renderer, samples, key, reporter)
    return renderer


class Moments:
    """Gathers the second moments X^T X / n of the inputs of matrices, in forward passes.

    Matrices that multiply the very same tensor, as q, k and v do, share one evidence. A matrix
    that looks rows up (an embedding, tied or not) has none: rows that are looked up are added to
    nothing, so their errors cannot make up for each other. Nor has one that nothing reaches.
    A convolution multiplies unfolded patches; each channel group has second moments of its own.
    A weight that is no plain factor of its module's input (fused experts, recurrent and odd
    layers) has none either, nor have some rows of a convolution with channel groups.

    Args:
        model: The original model.
        renderer: Says which modules are whose.
        samples: Makes the calibration sequences.
        key: What the evidence depends on, as a hash.
        reporter: Where progress is shown.
        limit: Most bytes of second moments, and factors of them, at a time; a single matrix may
            exceed it.
    """

    def __init__(
        self,
        model: LoadedModel,
        renderer: Renderer,
        samples: Callable[[], Samples],
        key: str,
        reporter: Reporter | None = None,
        limit: int = LIMIT,
    ) -> None:
        self._model, self._samples, self.key = model, samples, key
        self._reporter, self._limit = reporter or Reporter(quiet=True), limit
        self._renderer, self._places = renderer, dict[str, list[Place]]()

    def gather(self, names: Sequence[str]) -> Iterator[Mapping[str, Evidence]]:
        """The evidence on matrices, by name: as many at a time as there is room for.

        Raises:
            ValueError: If an input has NaN or Inf.
        """
        batches = cut_again(self._samples(), TOKENS)
        places: dict[str, list[Place]] = {}
        for use in uses_of(self._model, self._renderer, batches).by_factors:
            for part in self._renderer.parts_of(use.matrix):
                places.setdefault(part.name, []).append(use.place)
        self._places = {
            name: places[name]
            for name in names
            if name in places and not any(place.site.lookups for place in places[name])
        }
        if rest := [name for name in names if name not in self._places]:
            self._reporter.say(
                f"{len(rest)} of {len(names)} matrices have no second moments of inputs (looked "
                f"up, or used otherwise than as one product) and are rounded to nearest: {rest[0]}"
                + (f", {rest[1]}, ..." if len(rest) > 2 else "")
            )
            yield dict.fromkeys(rest, Evidence())
        sample = take(batches[0], 0, 1)
        inputs = shared_inputs(self._model, self._renderer, self._places, sample)
        rounds = in_rounds(inputs, self._limit, _room)
        count = sum(samples_in(batch) for batch in batches)
        for i, some in enumerate(rounds, 1):
            which = f" {i} of {len(rounds)}" if len(rounds) > 1 else ""
            with self._reporter.bar(f"Second moments of inputs{which}", count) as advance:
                evidences = self._accumulate(some, batches, advance)
            yield evidences
            del evidences  # the next ones need the room

    def _accumulate(
        self, inputs: Sequence[SharedInput], batches: Sequence[Batch], advance: Advance
    ) -> dict[str, Evidence]:
        sums: dict[str, Tensor] = {}
        counts = {found.names[0]: 0 for found in inputs}

        def add(name: str, place: Place, x: Tensor) -> None:
            for some in vectors(place, x):  # [parts, count, cols]
                if name not in sums:
                    parts, _, cols = some.shape
                    sums[name] = some.new_zeros(parts, cols, cols)
                sums[name].baddbmm_(some.transpose(1, 2), some)
                counts[name] += some.shape[1]

        places = {name: self._places[name] for name in counts}
        watch_inputs(self._model, places, batches, add, advance)
        result: dict[str, Evidence] = {}
        for found in inputs:
            leader = found.names[0]
            moments = sums.pop(leader, None)
            if moments is None or not counts[leader]:
                result |= dict.fromkeys(found.names, Evidence())
                continue
            if not moments.div_(counts[leader]).isfinite().all():
                raise ValueError(
                    f"The input of {leader!r} has NaN or Inf on the calibration data, or values "
                    f"whose squares overflow. Leave it out with --exclude {leader!r}."
                )
            result |= dict.fromkeys(found.names, Evidence(moments))
            if len(moments) > 1:  # rows that were cut do not fall into the channel groups
                cut = [name for name in found.names if self._renderer.parts[name].rows is not None]
                result |= dict.fromkeys(cut, Evidence())
        return result


def _room(found: SharedInput) -> int:
    """Bytes of the second moments and of a factor of them."""
    parts, cols = found.shape
    return 2 * 4 * parts * cols * cols

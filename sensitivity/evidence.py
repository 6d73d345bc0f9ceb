"""What rounding methods need to know of a model's data: second moments of what matrices multiply.

They come from forward passes of the original model over the calibration sequences, for as many
matrices at a time as there is room for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._base.progress import Advance, Reporter
from ..models.identity import definition_sha256
from ..models.rendering import Renderer, first_input
from ..models.samples import Samples
from ..models.sites import Place
from ..models.units import UnitInfo
from ..models.workload import Batch, LoadedModel, samples_in, take
from ..quantizers.methods import METHODS, Evidence
from .uses import uses_of

LIMIT = 1 << 31  # bytes of second moments and their factors at a time
TOKENS = 1024  # per forward pass of a language model, whatever --batch-tokens: sums stay the same


def calibrated(
    model: LoadedModel,
    units: Sequence[UnitInfo],
    rounding: str,
    samples: Callable[[], Samples],
    sha256: str,
    *,
    model_sha256: str,
    folder: Path | None = None,
    reporter: Reporter | None = None,
) -> Renderer:
    """A renderer whose rounding method has the evidence it needs.

    Args:
        model: The original model.
        units: Its units.
        rounding: Name of the rounding method.
        samples: Makes the calibration sequences, if they are needed.
        sha256: Their hash.
        model_sha256: Hash of the model's weights.
        folder: Where codes are kept that cannot be recomputed, for later runs, too.
        reporter: Where progress is shown.
    """
    renderer = Renderer(model.module, units, rounding, folder)
    if METHODS.trait(rounding, "needs"):
        parts = (model_sha256, definition_sha256(model), sha256)
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        renderer.store.evidence = Moments(model, renderer, samples, key, reporter)
    return renderer


@dataclass(frozen=True, slots=True)
class _Input:
    """An input that one or more matrices multiply.

    Attributes:
        names: The matrices, the first one standing for all.
        shape: (parts, cols) of the second moments.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the second moments and of a factor of them."""
        parts, cols = self.shape
        return 2 * 4 * parts * cols * cols


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
        batches = _batches(self._samples())
        self._places = {}
        for use in uses_of(self._model, self._renderer, batches).by_factors:
            for part in self._renderer.parts_of(use.matrix):
                self._places.setdefault(part.name, []).append(use.place)
        known = [name for name in names if name in self._places]
        inputs, rest = self._look(known, take(batches[0], 0, 1))
        rest += [name for name in names if name not in self._places]
        if rest:
            self._reporter.say(
                f"{len(rest)} of {len(names)} matrices have no second moments of inputs (looked "
                f"up, or used otherwise than as one product) and are rounded to nearest: {rest[0]}"
                + (f", {rest[1]}, ..." if len(rest) > 2 else "")
            )
            yield dict.fromkeys(rest, Evidence())
        rounds: list[list[_Input]] = []
        room = 0
        for found in inputs:
            if found.nbytes > room:
                rounds.append([])
                room = self._limit
            rounds[-1].append(found)
            room -= found.nbytes
        count = sum(samples_in(batch) for batch in batches)
        for i, some in enumerate(rounds, 1):
            which = f" {i} of {len(rounds)}" if len(rounds) > 1 else ""
            with self._reporter.bar(f"Second moments of inputs{which}", count) as advance:
                evidences = self._accumulate(some, batches, advance)
            yield evidences
            del evidences  # the next ones need the room

    def _look(self, names: Sequence[str], batch: Batch) -> tuple[list[_Input], list[str]]:
        """The inputs, as one sample shows them; and the matrices that have none."""
        calls: dict[str, list[tuple[Place, Tensor]]] = {name: [] for name in names}

        def note(name: str, place: Place, x: Tensor) -> None:
            calls[name].append((place, x))  # kept, so that no other tensor gets its place

        self._run(names, [batch], note)
        shared: dict[Any, list[str]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        lookups = []
        for name in names:
            if any(place.site.lookups for place in self._places[name]):
                lookups.append(name)
                continue
            same = tuple((id(x), x._version, _reading(place)) for place, x in calls[name])
            shared.setdefault(same or name, []).append(name)
            shapes[name] = (1, self._cols(name))
            for place, x in calls[name][:1]:
                parts, _, cols = next(_vectors(place, x)).shape
                shapes[name] = (parts, cols)
        return [_Input(tuple(some), shapes[some[0]]) for some in shared.values()], lookups

    def _accumulate(
        self, inputs: Sequence[_Input], batches: Sequence[Batch], advance: Advance
    ) -> dict[str, Evidence]:
        sums: dict[str, Tensor] = {}
        counts = {found.names[0]: 0 for found in inputs}

        def add(name: str, place: Place, x: Tensor) -> None:
            for vectors in _vectors(place, x):  # [parts, count, cols]
                if name not in sums:
                    parts, _, cols = vectors.shape
                    sums[name] = vectors.new_zeros(parts, cols, cols)
                sums[name].baddbmm_(vectors.transpose(1, 2), vectors)
                counts[name] += vectors.shape[1]

        self._run(list(counts), batches, add, advance)
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

    def _run(
        self,
        names: Sequence[str],
        batches: Sequence[Batch],
        visit: Callable[[str, Place, Tensor], None],
        advance: Advance = lambda _: None,
    ) -> None:
        """Run the model; ``visit`` sees the input of every use of the matrices."""

        def watch(name: str, place: Place) -> Any:
            def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                visit(name, place, first_input(args, kwargs))

            return place.module.register_forward_pre_hook(hook, with_kwargs=True)

        handles = [watch(name, place) for name in names for place in self._places[name]]
        try:
            with torch.no_grad():
                for batch in batches:
                    self._model.logits(batch)
                    advance(samples_in(batch))
        finally:
            for handle in handles:
                handle.remove()

    def _cols(self, name: str) -> int:
        return self._renderer.weight(name).shape[1]


def _vectors(place: Place, x: Tensor) -> Iterator[Tensor]:
    """The vectors that a matrix multiplies, float32 [parts, count, cols], in pieces.

    Images come one at a time: their patches are many times as large.
    """
    for piece in x.split(1) if x.dim() > 3 else (x,):
        yield place.site.inputs(place.module, piece, 1)[0].transpose(0, 1).float()


def _reading(place: Place) -> str:
    """What besides its input decides which vectors a matrix multiplies."""
    return f"{place.site_name} {place.module.extra_repr()}" if place.site_name == "conv" else ""


def _batches(samples: Samples) -> Sequence[Batch]:
    """The batches, or those of a language model cut again, for sums that no setting changes."""
    batches = samples.batches
    if samples.length is None or not all(isinstance(batch, Tensor) for batch in batches):
        return batches
    ids = torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    return list(ids.split(max(1, TOKENS // samples.length)))

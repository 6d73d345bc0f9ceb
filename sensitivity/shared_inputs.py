"""Which matrices multiply the very same input, as q, k and v do, and what that input is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._base.progress import Advance
from ..models.rendering import Renderer, first_input
from ..models.samples import Samples
from ..models.sites import Place
from ..models.workload import Batch, LoadedModel, samples_in

T = TypeVar("T")
Places = Mapping[str, Sequence[Place]]  # part name -> the modules that multiply by it


@dataclass(frozen=True, slots=True)
class SharedInput:
    """An input that one or more matrices multiply.

    Attributes:
        names: The matrices, the first one standing for all.
        shape: (parts, cols): channel groups, and entries of the vectors in each.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]


def shared_inputs(
    model: LoadedModel, renderer: Renderer, places: Places, sample: Batch
) -> list[SharedInput]:
    """The inputs of matrices, as one sample shows them.

    Args:
        model: The original model.
        renderer: Knows the matrices.
        places: The modules that multiply by each.
        sample: A batch of one sample.
    """
    calls: dict[str, list[tuple[Place, Tensor]]] = {name: [] for name in places}

    def note(name: str, place: Place, x: Tensor) -> None:
        calls[name].append((place, x))  # kept, so that no other tensor gets its place

    watch_inputs(model, places, [sample], note)
    shared: dict[Any, list[str]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name in places:
        same = tuple((id(x), x._version, _reading(place)) for place, x in calls[name])
        shared.setdefault(same or name, []).append(name)
        shapes[name] = (1, renderer.weight(name).shape[1])
        for place, x in calls[name][:1]:
            parts, _, cols = next(vectors(place, x)).shape
            shapes[name] = (parts, cols)
    return [SharedInput(tuple(some), shapes[some[0]]) for some in shared.values()]


def watch_inputs(
    model: LoadedModel,
    places: Places,
    batches: Sequence[Batch],
    visit: Callable[[str, Place, Tensor], None],
    advance: Advance = lambda _: None,
) -> None:
    """Run the model; ``visit`` sees the input of every use of the matrices."""

    def watch(name: str, place: Place) -> Any:
        def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            visit(name, place, first_input(args, kwargs))

        return place.module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name, place) for name, used in places.items() for place in used]
    try:
        with torch.no_grad():
            for batch in batches:
                model.logits(batch)
                advance(samples_in(batch))
    finally:
        for handle in handles:
            handle.remove()


def vectors(place: Place, x: Tensor) -> Iterator[Tensor]:
    """The vectors that a matrix multiplies, float32 [parts, count, cols], in pieces.

    Images come one at a time: their patches are many times as large.
    """
    for piece in x.split(1) if x.dim() > 3 else (x,):
        yield place.site.inputs(place.module, piece, 1)[0].transpose(0, 1).float()


def cut_again(samples: Samples, tokens: int) -> Sequence[Batch]:
    """The batches, or those of a language model cut again, for sums that no setting changes."""
    batches = samples.batches
    if samples.length is None or not all(isinstance(batch, Tensor) for batch in batches):
        return batches
    ids = torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    return list(ids.split(max(1, tokens // samples.length)))


def in_rounds(items: Sequence[T], limit: int, room: Callable[[T], int]) -> list[list[T]]:
    """Items in as few rounds as fit ``limit`` bytes each, in order; one alone may exceed it."""
    rounds: list[list[T]] = []
    left = 0
    for item in items:
        if room(item) > left:
            rounds.append([])
            left = limit
        rounds[-1].append(item)
        left -= room(item)
    return rounds


def _reading(place: Place) -> str:
    """What besides its input decides which vectors a matrix multiplies."""
    return f"{place.site_name} {place.module.extra_repr()}" if place.site_name == "conv" else ""

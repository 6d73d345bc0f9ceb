"""A pass block by block: each block's weights are there once forward and once backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._base.memory import give_back
from .borders import LIMIT, Borders, joined_state, split_state
from .passes import Advance, G_co, GradientVisitor, InputVisitor, Upstream
from .prefix import Prefix, State, trial_inputs
from .rendering import Renderer
from .samples import Samples
from .sites import places
from .streamed import held, is_streamed
from .units import UnitInfo
from .whole import Reader, WholePass, numbered, tell, visiting
from .workload import Batch, LoadedModel, samples_in, take

LOGITS = 1 << 26  # bytes of the logits of a piece of text on the way back; several are there
_TOLERANCE = 1e-4  # relative difference of gradients that are the same
_BACKWARD = 3  # times the work of a forward pass, for progress


class BlockwisePass(WholePass[G_co]):
    """A :class:`.passes.Pass` that takes all samples through one block after the other.

    The states at the borders of blocks are kept, in memory up to a limit and in a file beyond it.
    A backward pass goes forward once, keeping the states at all borders, and then from the last
    block to the first, which each run again from the state below them.  Weights that lie in files
    (:mod:`.streamed`) are made float32 once per block and direction.

    The logits of a long text, and what is made of them, are there for a few samples at a time.

    Masks, positions and the like are the model's own: it runs its own code, with all blocks but
    one left out.  Whether that gives the gradients of the whole model is tried out on a few tokens,
    and whether two inputs, one block of either in turn, get its logits.
    A model of which it does not is gone through as a whole, batch by batch.

    Args:
        model: As for :class:`.whole.WholePass`.
        renderer: Likewise.
        units: Likewise.
        samples: Likewise.
        reader: Likewise.
        limit: Bytes of states in memory.
    """

    def __init__(
        self,
        model: LoadedModel,
        renderer: Renderer,
        units: Sequence[UnitInfo],
        samples: Samples,
        reader: Reader[G_co],
        limit: int = LIMIT,
    ) -> None:
        super().__init__(model, renderer, units, samples, reader)
        self._limit = limit
        self._classes = 1  # of the logits

    @property
    def is_blockwise(self) -> bool:
        """Whether blocks are gone through one by one; the first call runs a few tokens."""
        return bool(self._divide()[0].blocks)

    def forward(
        self,
        visit: InputVisitor,
        advance: Advance = lambda _: None,
        names: Collection[str] | None = None,
    ) -> NDArray[np.int64]:
        """See :meth:`.passes.Pass.forward`."""
        prefix, _ = self._divide()
        if not prefix.blocks:
            return super().forward(visit, advance, names)
        positions = np.zeros(self._samples.count, np.int64)
        watched = [use for use in self._watch() if names is None or use.name in names]
        batches = list(numbered(self._samples.batches))
        borders, done = Borders(self._limit), Progress(advance, self._samples.count)
        last = len(prefix.blocks) + 1
        with torch.no_grad():
            for number in range(1, last + 1):
                with block_there(self._model, prefix, number):
                    for i, (batch, samples) in enumerate(batches):
                        state = self._state(borders, i) if number > 1 else None
                        with (
                            prefix.counted() as step,
                            visiting(watched, visit, samples, partial(_is_in, step, number)),
                        ):
                            found = segment(self._model, prefix, number, batch, state)
                        if number < last:
                            borders.put(i, found)
                        else:
                            positions[samples.start : samples.stop] = found.shape[1]
                        del found
                done.to(number / last)
        return positions

    def backward(
        self,
        *probes: tuple[Upstream, GradientVisitor[G_co]],
        advance: Advance = lambda _: None,
    ) -> NDArray[np.int64]:
        """See :meth:`.passes.Pass.backward`; raises a ValueError as the reader does."""
        prefix, _ = self._divide()
        if not prefix.blocks:
            return super().backward(*probes, advance=advance)
        pieces = list(numbered(self._cut(self._reader.pieces(self._samples.batches))))
        positions = np.zeros(self._samples.count, np.int64)
        self._sweep(prefix, pieces, probes, positions, Progress(advance, self._samples.count))
        return positions

    def _cut(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, those of texts in pieces of few enough samples for their logits."""
        for batch in batches:
            count = step = samples_in(batch)
            if self._model.is_language_model and isinstance(batch, Tensor):
                step = max(1, LOGITS // (4 * batch.shape[1] * self._classes))
            if step >= count:
                yield batch
            else:
                yield from (take(batch, i, i + step) for i in range(0, count, step))

    def _sweep(
        self,
        prefix: Prefix,
        pieces: Sequence[tuple[Batch, range]],
        probes: Sequence[tuple[Upstream, GradientVisitor[G_co]]],
        positions: NDArray[np.int64],
        done: Progress,
    ) -> None:
        """Forward through all blocks, and backward through all."""
        last = len(prefix.blocks) + 1
        states, gradients = Borders(self._limit), Borders(self._limit)
        work = last * (1 + _BACKWARD)
        with torch.no_grad():
            for number in range(1, last):
                with block_there(self._model, prefix, number):
                    for i, (batch, _) in enumerate(pieces):
                        below = self._state(states, (number - 1, i)) if number > 1 else None
                        states.put((number, i), segment(self._model, prefix, number, batch, below))
                give_back()
                done.to(number / work)
        for number in range(last, 0, -1):
            with block_there(self._model, prefix, number):
                for i, (batch, samples) in enumerate(pieces):
                    shape = self._back(prefix, number, i, batch, samples, probes, states, gradients)
                    if number == last:
                        positions[samples.start : samples.stop] = shape[1]
                    give_back()
            done.to((last + _BACKWARD * (last + 1 - number)) / work)

    def _back(
        self,
        prefix: Prefix,
        number: int,
        piece: int,
        batch: Batch,
        samples: range,
        probes: Sequence[tuple[Upstream, GradientVisitor[G_co]]],
        states: Borders,
        gradients: Borders,
    ) -> torch.Size:
        """A block on one piece of the samples, with the gradients at its output from above."""
        last = number == len(prefix.blocks) + 1
        leaf, rest, at_hand = None, None, 0
        if number > 1:
            leaf, rest = states.get((number - 1, piece))
            leaf.requires_grad_(True)

        def hand_down(hidden: Tensor) -> None:
            assert hidden.grad is not None
            gradients.put((at_hand, piece), hidden.grad)
            hidden.grad = None

        def upstream_of(probe: int) -> Upstream:
            def upstream(output: Tensor, inputs: Batch) -> Tensor:
                nonlocal at_hand
                at_hand = probe
                if last:
                    return probes[probe][0](output, inputs)
                if (probe, piece) not in gradients:  # the output does not depend on the state
                    return torch.zeros_like(output)
                above = gradients.get((probe, piece))[0]
                gradients.drop((probe, piece))  # lest a block that hands none down hands down this
                return above

            return upstream

        def run() -> Tensor:
            state = None if leaf is None else joined_state(leaf, rest)
            found = segment(self._model, prefix, number, batch, state)
            return found if last else split_state(found)[0]

        told = [(upstream_of(i), tell(visit, samples)) for i, (_, visit) in enumerate(probes)]
        if leaf is not None:
            leaf.register_post_accumulate_grad_hook(hand_down)
        return self._reader.stream(batch, *told, run=run).shape

    def _state(self, borders: Borders, key: Any) -> State:
        return joined_state(*borders.get(key))

    def _try(self, prefix: Prefix, trial: Batch) -> None:
        """Give the blocks up unless every use has the gradients block by block that it has else."""
        if not prefix.blocks:
            return
        found: list[list[tuple[str, float]]] = [[], []]

        def note(number: int) -> Callable[[str, Any], None]:
            def visit(name: str, gradient: Any) -> None:
                size = sum(float(part.double().norm()) for part in _tensors(gradient))
                found[number].append((name, size))

            return visit

        def upstream(logits: Tensor, _batch: Batch) -> Tensor:
            self._classes = logits.shape[-1]
            generator = torch.Generator().manual_seed(0)
            return torch.randn(logits.shape, generator=generator).to(logits.device)

        try:
            ((piece, samples),) = numbered(self._reader.pieces([trial]))
            with torch.enable_grad():
                self._reader.stream(piece, (upstream, note(0)))
                blockwise = note(1)
                visit: Any = lambda name, gradient, _: blockwise(name, gradient)  # noqa: E731
                positions, done = np.zeros(len(samples), np.int64), Progress(lambda _: None, 1)
                self._sweep(prefix, [(piece, samples)], [(upstream, visit)], positions, done)
            if not blocks_agree(self._model, prefix, trials_of(self._model, self._samples)):
                found[1].clear()
        except MemoryError:
            raise
        except Exception:  # whatever a model's code does with an input that was not processed
            found[1].clear()
        scale = max((size for _, size in found[0]), default=0.0)
        same = [name for name, _ in found[0]] == [name for name, _ in found[1]] != [] and all(
            abs(a - b) <= _TOLERANCE * max(a, 1e-3 * scale)
            for (_, a), (_, b) in zip(*found, strict=False)
        )
        if not same:
            prefix.blocks = []
            if is_streamed(self._model.module):
                warnings.warn(
                    f"{self._model.id} cannot be run from between its blocks: it is gone through "
                    "as a whole, and its files are read once for every batch.",
                    stacklevel=2,
                )


def segment(model: LoadedModel, prefix: Prefix, number: int, batch: Batch, state: State) -> Any:
    """What block ``number`` gives from the state before it; the logits for the part after all.

    What comes before the first block runs with it.
    """
    below = number - 1
    states = {below: state} if below else {}
    if number <= len(prefix.blocks):
        return prefix.until(model.logits, batch, states, below, number)
    return prefix.run(model.logits, batch, states, below)[0]


def trials_of(model: LoadedModel, samples: Samples) -> list[Batch]:
    """A little of the first and of the last sample, not the same."""
    first, last = samples.batches[0], samples.batches[-1]
    count = samples_in(last)
    pair = [first, take(last, count - 1, count)]
    one, other = (trial_inputs(batch, model.is_language_model) for batch in pair)
    if isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other):
        other = other[:, :1].expand_as(other).clone() if other.dim() > 1 else other
    return [one, other]


def blocks_agree(model: LoadedModel, prefix: Prefix, trials: Sequence[Batch]) -> bool:
    """Whether inputs taken through every block in turn get the logits of the whole model.

    They do not where a block leaves something in the model that a later one reads.
    """
    expected = [model.logits(trial) for trial in trials]
    borders, last = Borders(), len(prefix.blocks) + 1
    try:
        for number in range(1, last + 1):
            with block_there(model, prefix, number):
                for i, trial in enumerate(trials):
                    state = joined_state(*borders.get(i)) if number > 1 else None
                    found = segment(model, prefix, number, trial, state)
                    if number < last:
                        borders.put(i, found)
                    elif not torch.allclose(
                        found, expected[i], rtol=0, atol=1e-6 * float(expected[i].abs().max())
                    ):
                        return False
    except MemoryError:
        raise
    except Exception:  # whatever a model's code does with an input that was not processed
        return False
    return True


@contextmanager
def block_there(model: LoadedModel, prefix: Prefix, number: int) -> Iterator[None]:
    """Keep the weights of a block, or of what comes after all, in float32."""
    if number <= len(prefix.blocks):
        parameters = list(prefix.blocks[number - 1].parameters())
    else:
        inside = {id(p) for block in prefix.blocks for p in block.parameters()}
        parameters = [
            place.parameter
            for place in places(model.module)
            if not place.site.lookups and id(place.parameter) not in inside
        ]
    with held(parameters):
        yield


class Progress:
    """Tells samples as shares of the work are done."""

    def __init__(self, advance: Advance, count: int) -> None:
        self._advance, self._count, self._told = advance, count, 0

    def to(self, share: float) -> None:
        """So much of the work is done."""
        whole = round(share * self._count)
        if whole > self._told:
            self._advance(whole - self._told)
            self._told = whole


def _is_in(step: Callable[[], int], number: int) -> bool:
    return step() == number or (number == 1 and step() == 0)


def _tensors(gradient: Any) -> Iterator[Tensor]:
    """The tensors with numbers in a gradient of any form."""
    fields = getattr(gradient, "__dataclass_fields__", {})
    for value in [gradient, *(getattr(gradient, name) for name in fields)]:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value

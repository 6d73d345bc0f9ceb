"""A pass with the whole model in memory, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._base.memory import give_back
from ..quantizers.format import Format
from .passes import (
    Advance,
    AfterBlock,
    G_co,
    G_contra,
    GradientVisitor,
    Inputs,
    InputVisitor,
    Upstream,
)
from .prefix import Prefix, State, blocks_of, trial_inputs
from .rendering import Renderer, first_input
from .samples import Samples
from .units import UnitInfo
from .workload import Batch, LoadedModel, samples_in


class Watched(NamedTuple):
    """A module whose input multiplies a matrix.

    Attributes:
        name: See :class:`Inputs`, as for ``kind`` and ``scale``.
        kind: The kind of use.
        module: The module.
        read: Maps the module's input, and the number of samples to tell it apart by, to what
            multiplies the matrix.
        scale: The multiple of the product.
        divides: Whether the module's input has samples as its first dimension, or an equal number
            of entries of each.
    """

    name: str
    kind: str
    module: nn.Module
    read: Callable[[Tensor, int], Tensor]
    scale: float = 1.0
    divides: bool = True


class Reader(Protocol[G_co]):
    """What is read of a model in memory while it runs."""

    def watched(self) -> Iterable[Watched]:
        """Every use of a matrix that multiplies inputs."""

    def pieces(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """The batches cut, in order, as :meth:`stream` can take them."""

    def stream(
        self,
        batch: Batch,
        *probes: tuple[Upstream, Callable[[str, G_co], None]],
        run: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """One forward pass, and a backward pass for every upstream, whose gradients are shown.

        Args:
            batch: What the model is run on.
            *probes: Gradients at the logits, and who sees those of matrices.
            run: Runs a part of the model instead; gradients are those at what it gives.

        Returns:
            The logits [samples, positions, classes], or what ``run`` gives.
        """


class WholePass(Generic[G_co]):
    """A :class:`.passes.Pass` with all of the model in memory, one batch after the other.

    Args:
        model: The model; its parameters do not require gradients.
        renderer: Says where the matrices are and renders what :meth:`sequential` is answered.
        units: The units, which tell where the repeated blocks are.
        samples: The inputs.
        reader: Reads inputs and gradients.
    """

    def __init__(
        self,
        model: LoadedModel,
        renderer: Renderer,
        units: Sequence[UnitInfo],
        samples: Samples,
        reader: Reader[G_co],
    ) -> None:
        self._model, self._renderer, self._units = model, renderer, units
        self._samples, self._reader = samples, reader
        self._divided: tuple[Prefix, list[list[str]]] | None = None
        self._watched: list[Watched] = []
        self._shared: frozenset[str] = frozenset()

    @property
    def samples(self) -> Samples:
        """The inputs."""
        return self._samples

    @property
    def blocks(self) -> Sequence[Sequence[str]]:
        """The canonical names of all matrices by block; the first call runs a few tokens."""
        return self._divide()[1]

    @property
    def shared(self) -> frozenset[str]:
        """Names of matrices that more than one block uses."""
        self._divide()
        return self._shared

    def weight(self, name: str) -> Tensor:
        """The original matrix float32 [rows, cols]; all are there at any time."""
        return self._renderer.weight(name)

    def forward(
        self,
        visit: InputVisitor,
        advance: Advance = lambda _: None,
        names: Collection[str] | None = None,
    ) -> NDArray[np.int64]:
        """See :meth:`Pass.forward`."""
        positions = np.zeros(self._samples.count, np.int64)
        watched = [use for use in self._watch() if names is None or use.name in names]
        with torch.no_grad():
            for batch, samples in numbered(self._samples.batches):
                with visiting(watched, visit, samples):
                    logits = self._model.logits(batch)
                positions[samples.start : samples.stop] = logits.shape[1]
                del logits  # or they would stay in memory during the next batch
                advance(len(samples))
        return positions

    def backward(
        self,
        *probes: tuple[Upstream, GradientVisitor[G_co]],
        advance: Advance = lambda _: None,
    ) -> NDArray[np.int64]:
        """See :meth:`Pass.backward`; raises a ValueError as the reader does."""
        positions = np.zeros(self._samples.count, np.int64)
        for batch, samples in numbered(self._reader.pieces(self._samples.batches)):
            told = [(upstream, tell(visit, samples)) for upstream, visit in probes]
            shape = self._reader.stream(batch, *told).shape
            positions[samples.start : samples.stop] = shape[1]
            give_back()
            advance(len(samples))
        return positions

    def sequential(
        self,
        after_block: AfterBlock,
        visit: InputVisitor | None = None,
        original: InputVisitor | None = None,
    ) -> None:
        """See :meth:`Pass.sequential`.

        One state per batch is kept, that at the border at hand, and one of the unchanged model if
        that is shown.

        Raises:
            ValueError: If an answer names a matrix that is not in the block.
        """
        prefix, blocks = self._divide()
        if visit is not None or original is not None:
            self._watch()
        batches = list(numbered(self._samples.batches))
        states: list[State] = [None] * len(batches)
        unchanged: list[State] = [None] * len(batches)
        changed: dict[str, Format] = {}
        with torch.no_grad():
            for number, names in enumerate(blocks):
                passed = 0 < number <= len(prefix.blocks)
                for i, (batch, samples) in enumerate(batches):
                    if original is not None:
                        run = prefix, number, batch, unchanged[i]
                        state = self._show_block(original, samples, *run)
                        unchanged[i] = state if passed else None
                    if visit is not None:
                        with self._renderer.applied(changed):
                            self._show_block(visit, samples, prefix, number, batch, states[i])
                chosen = after_block(number, names)
                if unknown := set(chosen).difference(names):
                    raise ValueError(
                        f"After block {number}, {sorted(unknown)[0]!r} was changed, which is not "
                        f"among its {len(names)} matrices. Change a matrix after its own block."
                    )
                changed.update(chosen)
                if passed:
                    with self._renderer.applied(changed):
                        for i, (batch, _) in enumerate(batches):
                            states[i] = self._run_block(prefix, number, batch, states[i])

    def _show_block(
        self,
        visit: InputVisitor,
        samples: range,
        prefix: Prefix,
        number: int,
        batch: Batch,
        state: State,
    ) -> State:
        """Run a block and show its inputs; what runs along before it is not shown again."""
        with (
            prefix.counted() as step,
            visiting(self._watched, visit, samples, partial(_is_at, step, number)),
        ):
            return self._run_block(prefix, number, batch, state)

    def _run_block(self, prefix: Prefix, number: int, batch: Batch, state: State) -> State:
        """Run a block from the state before it; what comes before the first runs along."""
        border = max(number - 1, 0)
        states = {border: state} if border else {}
        if number <= len(prefix.blocks) and prefix.blocks:
            return prefix.until(self._model.logits, batch, states, border, number)
        prefix.run(self._model.logits, batch, states, border)
        return None

    def _divide(self) -> tuple[Prefix, list[list[str]]]:
        """The blocks, and the matrices by the block that uses them first."""
        if self._divided is None:
            model, batch = self._model, self._samples.batches[0]
            named = blocks_of(model.module, self._units)
            prefix = Prefix(named.values())
            trial = trial_inputs(batch, model.is_language_model)
            with torch.no_grad():
                trace = prefix.trace(model.logits, trial, self._renderer.hooked_modules())
                self._try(prefix, trial)
            count = len(prefix.blocks) + 2 if prefix.blocks else 1
            blocks: list[list[str]] = [[] for _ in range(count)]
            for name in self._renderer.names:
                number = trace.steps.get(name, [_place(name, named)])[0]
                blocks[min(number, count - 1)].append(name)
            self._shared = frozenset(n for n, steps in trace.steps.items() if len(set(steps)) > 1)
            self._divided = prefix, blocks
        return self._divided

    def _try(self, prefix: Prefix, trial: Batch) -> None:
        """Give the blocks of a prefix up if the model cannot be run from between them."""
        prefix.can_skip(self._model.logits, trial, range(1, len(prefix.blocks) + 1))

    def _watch(self) -> list[Watched]:
        """The uses that inputs are shown of, found out before anything else runs the model."""
        self._watched = self._watched or list(self._reader.watched())
        return self._watched


@contextmanager
def visiting(
    watched: Iterable[Watched],
    visit: InputVisitor,
    samples: range,
    here: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Inside the block, show the inputs of uses while ``here()``."""

    def show(use: Watched) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any) -> None:
            if here():
                x = first_input(args, kwargs)
                read = use.read(x, _told_apart(x, len(samples)) if use.divides else 1)
                visit(Inputs(use.name, use.kind, read, use.scale, samples))

        return hook

    with ExitStack() as undo:
        for use in watched:
            handle = use.module.register_forward_hook(show(use), with_kwargs=True)
            undo.callback(handle.remove)
        yield


def _is_at(step: Callable[[], int], number: int) -> bool:
    return step() == number


def numbered(batches: Iterable[Batch]) -> Iterator[tuple[Batch, range]]:
    """Batches with the numbers of their samples."""
    first = 0
    for batch in batches:
        yield batch, range(first, first := first + samples_in(batch))


def tell(visit: GradientVisitor[G_contra], samples: range) -> Callable[[str, G_contra], None]:
    """What sees gradients of some samples for a visitor that is told which."""
    return lambda name, gradient: visit(name, gradient, samples)


def _told_apart(x: Tensor, samples: int) -> int:
    """By how many samples an input can be told apart: all or 1."""
    shared = x.dim() == 1 and not x.is_floating_point() and len(x) != samples
    return 1 if shared or len(x) % samples or len(x) == 0 else samples


def _place(name: str, blocks: Mapping[str, nn.Module]) -> int:
    """The block of a matrix which the trial did not see used, such as an expert's.

    Outside the repeated blocks it counts as used before them, so that a change reaches them.
    """
    for number, block in enumerate(blocks, 1):
        if name.startswith(f"{block}."):
            return number
    return 0

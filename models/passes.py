"""How calibration inputs travel through a model: who looks at inputs and gradients says only what.

A :class:`Pass` is asked for inputs, gradients, or both block by block; how it gets them, with the
whole model in memory or one block at a time, is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .prefix import Prefix, State, blocks_of, trial_inputs
from .rendering import Assignment, Renderer, first_input
from .samples import Samples
from .units import UnitInfo
from .workload import Batch, LoadedModel, samples_in

# A gradient of a matrix, in whatever form: such as its two factors per sample.
G_co = TypeVar("G_co", covariant=True)
G_contra = TypeVar("G_contra", contravariant=True)

# Gradient with respect to the logits [samples, positions, classes], from the logits themselves.
Upstream = Callable[[Tensor, Batch], Tensor]
Advance = Callable[[int], None]  # told a number of finished samples


class InputVisitor(Protocol):
    """Looks at what multiplies a matrix."""

    def __call__(self, name: str, x: Tensor, samples: range, /) -> None:
        """See the input of one use of a matrix on one batch.

        Args:
            name: Canonical matrix name.
            x: [samples, positions, channel_groups, cols]; token ids [samples, positions] of a
                lookup.  The first dimension is 1, and the positions are those of all samples,
                where inputs cannot be told apart by sample (routed tokens, shared position ids).
            samples: Numbers of the samples among all of the pass.
        """


class GradientVisitor(Protocol[G_contra]):
    """Looks at the gradient of a matrix."""

    def __call__(self, name: str, gradient: G_contra, samples: range, /) -> None:
        """See the gradient that one use of a matrix contributes on one batch, per sample."""


# After a block, with the names of its matrices; the answer is what they are from now on.
AfterBlock = Callable[[int, Sequence[str]], Assignment]


class Pass(Protocol[G_co]):
    """Takes calibration samples through a model.

    What a visitor may rely on, and every implementation must provide:

    * **Names.**  Matrices go by their canonical names.  A matrix used twice, or tied to another,
      is visited once per use; one that is not used, or does not influence the output, never.
    * **Order.**  Within one batch, :meth:`forward` visits uses in the order in which they run and
      :meth:`backward` in the opposite one.  Nothing is promised across batches: with the model in
      memory a pass goes batch by batch, each through all blocks; with one block in memory, block
      by block (backward: from the last to the first), each with all batches.  So a visitor adds
      to sums, or to the rows of the samples it is told, and finishes when the call returns.
    * **Lifetime.**  Tensors shown are the visitor's until it returns; what it keeps, it pays for.
      :meth:`weight` may be asked for the matrix being visited, and in ``after_block`` for those
      of the block, and for no other.
    * **Random draws.**  Upstreams are called once per batch, in the order of the batches and,
      within one, of the arguments, so that the same seed gives the same draws.

    An implementation that loads blocks from a checkpoint one at a time keeps, for every batch, the
    state at *one* border when it goes forward (the input of the block at hand, replaced by its
    output: what the block hands on, such as the hidden state, and once per batch what all blocks
    are given besides, such as masks and rotary embeddings), in memory or in a mapped file.  For
    :meth:`backward` it keeps the states at *all* borders, or recomputes them from a few, and the
    gradient at one border; from the last block to the first it loads the block, runs it again with
    gradients from the state below, takes the gradient at its output from above, visits, and hands
    the gradient at its input down.  What comes before and after the repeated blocks are blocks too
    (:attr:`blocks`), and the logits of a batch exist only while its upstreams are asked.
    """

    @property
    def samples(self) -> Samples:
        """The inputs."""

    @property
    def blocks(self) -> Sequence[Sequence[str]]:
        """The canonical names of all matrices, by the block that uses them first, in order.

        The first block is what comes before the repeated ones and the last what comes after (both
        may be without matrices); a model without repeated blocks is one block.
        """

    def weight(self, name: str) -> Tensor:
        """The original matrix [rows, cols], while it is there (see above)."""

    def forward(
        self,
        visit: InputVisitor,
        advance: Advance = lambda _: None,
        names: Collection[str] | None = None,
    ) -> NDArray[np.int64]:
        """Show the inputs of every matrix, or of those named, on all samples.

        Returns:
            int64 [N], the positions of every sample at the logits.
        """

    def backward(
        self,
        *probes: tuple[Upstream, GradientVisitor[G_co]],
        advance: Advance = lambda _: None,
    ) -> NDArray[np.int64]:
        """Show the gradients of every matrix on all samples, for one or more upstreams.

        For one batch, and of one block, the visits of the first probe come before those of the
        second, which come in the same order.

        Returns:
            int64 [N], the positions of every sample at the logits.
        """

    def sequential(self, after_block: AfterBlock, visit: InputVisitor | None = None) -> None:
        """Go through the blocks, each with all samples, and let every block change what follows.

        For each block in turn: its inputs are shown to ``visit``, computed with its original
        weights after blocks that are already changed; ``after_block`` is called with its number
        and the names of its matrices, and answers with the formats they have from now on (a
        matrix it does not name stays original); then the block runs again as it now is, and its
        outputs are the inputs of the next.  A matrix that later blocks use too is changed there
        as well.

        References:
            Frantar et al. (2023), GPTQ, Sec. 4: each block is quantized on the inputs that the
            quantized blocks before it give.
        """


class Watched(NamedTuple):
    """A module whose input multiplies a matrix.

    Attributes:
        name: The matrix.
        module: The module.
        read: Maps the module's input, and the number of samples to tell it apart by, to what
            multiplies the matrix: see :class:`InputVisitor`.
    """

    name: str
    module: nn.Module
    read: Callable[[Tensor, int], Tensor]


class Reader(Protocol[G_co]):
    """What is read of a model in memory while it runs."""

    def watched(self) -> Iterable[Watched]:
        """Every use of a matrix that multiplies inputs."""

    def pieces(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """The batches cut, in order, as :meth:`stream` can take them."""

    def stream(self, batch: Batch, *probes: tuple[Upstream, Callable[[str, G_co], None]]) -> Tensor:
        """One forward pass, and a backward pass for every upstream, whose gradients are shown.

        Returns:
            The logits [samples, positions, classes].
        """


class WholePass(Generic[G_co]):
    """A pass with the whole model in memory, batch by batch.

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

    @property
    def samples(self) -> Samples:
        """The inputs."""
        return self._samples

    @property
    def blocks(self) -> Sequence[Sequence[str]]:
        """The canonical names of all matrices by block; the first call runs a few tokens."""
        return self._divide()[1]

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
        with torch.no_grad():
            for batch, samples in _numbered(self._samples.batches):
                with self._visiting(visit, samples, names=names):
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
        for batch, samples in _numbered(self._reader.pieces(self._samples.batches)):
            told = [(upstream, _tell(visit, samples)) for upstream, visit in probes]
            shape = self._reader.stream(batch, *told).shape
            positions[samples.start : samples.stop] = shape[1]
            advance(len(samples))
        return positions

    def sequential(self, after_block: AfterBlock, visit: InputVisitor | None = None) -> None:
        """See :meth:`Pass.sequential`.

        One state per batch is kept, that at the border at hand.

        Raises:
            ValueError: If an answer names a matrix that is not in the block.
        """
        prefix, blocks = self._divide()
        batches = list(_numbered(self._samples.batches))
        states: list[State] = [None] * len(batches)
        with torch.no_grad(), ExitStack() as changed:
            for number, names in enumerate(blocks):
                if visit is not None:
                    for state, (batch, samples) in zip(states, batches, strict=True):
                        self._show_block(prefix, number, batch, samples, state, visit)
                chosen = after_block(number, names)
                if unknown := set(chosen).difference(names):
                    raise ValueError(
                        f"After block {number}, {sorted(unknown)[0]!r} was changed, which is not "
                        f"among its {len(names)} matrices. Change a matrix after its own block."
                    )
                changed.enter_context(self._renderer.applied(chosen))
                if 0 < number <= len(prefix.blocks):
                    for i, (batch, _) in enumerate(batches):
                        states[i] = self._run_block(prefix, number, batch, states[i])

    def _show_block(
        self,
        prefix: Prefix,
        number: int,
        batch: Batch,
        samples: range,
        state: State,
        visit: InputVisitor,
    ) -> None:
        """Show the inputs of a block's matrices, not those of what runs along before it."""
        with (
            prefix.counted() as step,
            self._visiting(visit, samples, lambda: step() == number),
        ):
            self._run_block(prefix, number, batch, state)

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
                prefix.can_skip(model.logits, trial, range(1, len(prefix.blocks) + 1))
            count = len(prefix.blocks) + 2 if prefix.blocks else 1
            blocks: list[list[str]] = [[] for _ in range(count)]
            for name in self._renderer.names:
                number = trace.steps.get(name, [_place(name, named)])[0]
                blocks[min(number, count - 1)].append(name)
            self._divided = prefix, blocks
        return self._divided

    @contextmanager
    def _visiting(
        self,
        visit: InputVisitor,
        samples: range,
        here: Callable[[], bool] = lambda: True,
        names: Collection[str] | None = None,
    ) -> Iterator[None]:
        """Inside the block, show the inputs of matrices used while ``here()``."""

        def show(watched: Watched) -> Callable[..., None]:
            def hook(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any
            ) -> None:
                if here():
                    x = first_input(args, kwargs)
                    visit(watched.name, watched.read(x, _told_apart(x, len(samples))), samples)

            return hook

        with ExitStack() as undo:
            for watched in self._reader.watched():
                if names is None or watched.name in names:
                    hook = watched.module.register_forward_hook(show(watched), with_kwargs=True)
                    undo.callback(hook.remove)
            yield


def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[Batch, range]]:
    """Batches with the numbers of their samples."""
    first = 0
    for batch in batches:
        yield batch, range(first, first := first + samples_in(batch))


def _tell(visit: GradientVisitor[G_contra], samples: range) -> Callable[[str, G_contra], None]:
    return lambda name, gradient: visit(name, gradient, samples)


def _told_apart(x: Tensor, samples: int) -> int:
    """By how many samples an input can be told apart: all or 1."""
    shared = x.dim() == 1 and not x.is_floating_point() and len(x) != samples
    return 1 if shared or len(x) % samples or len(x) == 0 else samples


def _place(name: str, blocks: Mapping[str, nn.Module]) -> int:
    """The block that holds a matrix which the trial did not use, such as an expert's."""
    for number, block in enumerate(blocks, 1):
        if name.startswith(f"{block}."):
            return number
    return len(blocks) + 1

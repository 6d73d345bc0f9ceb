"""How calibration inputs travel through a model: who looks at inputs and gradients says only what.

A :class:`Pass` is asked for inputs, gradients, or both block by block; how it gets them, with the
whole model in memory or one block at a time, is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .rendering import Assignment
from .samples import Samples
from .workload import Batch

# A gradient of a matrix, in whatever form: such as its two factors per sample.
G_co = TypeVar("G_co", covariant=True)
G_contra = TypeVar("G_contra", contravariant=True)

# Gradient with respect to the logits [samples, positions, classes], from the logits themselves.
Upstream = Callable[[Tensor, Batch], Tensor]
Advance = Callable[[int], None]  # told a number of finished samples


@dataclass(frozen=True, slots=True)
class Inputs:
    """What multiplied a matrix in one use of it, on one batch.

    Attributes:
        name: Name of the matrix.
        kind: The kind of use, such as ``linear``; a tied matrix has two.
        x: [samples, positions, channel_groups, cols]; row indices [samples, positions] of a
            lookup.  The first dimension is 1, and the positions are those of all samples, where
            inputs cannot be told apart by sample (routed tokens, shared position ids).
        scale: The use gives this multiple of the product of matrix and input.
        samples: Numbers of the samples among all of the pass.
    """

    name: str
    kind: str
    x: Tensor
    scale: float
    samples: range


InputVisitor = Callable[[Inputs], None]


class GradientVisitor(Protocol[G_contra]):
    """Looks at the gradient of a matrix."""

    def __call__(self, name: str, gradient: G_contra, samples: range, /) -> None:
        """See the gradient that one use of a matrix contributes on one batch, per sample."""


# After a block, with the names of its parts; the answer is what they are from now on.
AfterBlock = Callable[[int, Sequence[str]], Assignment]


class Pass(Protocol[G_co]):
    """Takes calibration samples through a model.

    What a visitor may rely on, and every implementation must provide:

    * **Names.**  Gradients go by the names of parts (the matrix, or some rows of it), inputs by
      those of matrices.  A matrix used twice, or tied to another, is visited once per use; one
      that is not used, or does not influence the output, never, and inputs are shown only where
      a module multiplies its input by the matrix and does nothing else with it.
    * **Order.**  Within one batch, :meth:`forward` visits uses in the order in which they run and
      :meth:`backward` in the opposite one.  Nothing is promised across batches: with the model in
      memory a pass goes batch by batch, each through all blocks; with one block in memory, block
      by block (backward: from the last to the first), each with all batches.  So a visitor adds
      to sums, or to the rows of the samples it is told, and finishes when the call returns.  How
      many samples come at a time is the pass's choice as well.
    * **Lifetime.**  Tensors shown are the visitor's until it returns; what it keeps, it pays for.
      :meth:`weight` may be asked for the matrix being visited, and in ``after_block`` for those
      of the block, and for no other.
    * **Random draws.**  Upstreams are called once per batch, in the order of the batches and,
      within one, of the arguments, so that the same seed gives the same draws.  What they return
      is the pass's, to overwrite.

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
        """The names of all parts, by the block that uses them first, in order.

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

    def sequential(
        self,
        after_block: AfterBlock,
        visit: InputVisitor | None = None,
        original: InputVisitor | None = None,
    ) -> None:
        """Go through the blocks, each with all samples, and let every block change what follows.

        For each block in turn: its inputs are shown to ``visit``, computed with its original
        weights after blocks that are already changed; ``after_block`` is called with its number
        and the names of its matrices, and answers with the formats they have from now on (a
        matrix it does not name stays original); then the block runs again as it now is, and its
        outputs are the inputs of the next.  A matrix that later blocks use too is changed there
        as well.

        ``original`` is shown the same uses in the model without any change: those of a block and
        batch just before ``visit`` is shown them.

        References:
            Frantar et al. (2023), GPTQ, Sec. 4: each block is quantized on the inputs that the
            quantized blocks before it give.
        """

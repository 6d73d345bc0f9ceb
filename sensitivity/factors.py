"""Per-sample gradients of a matrix, as factors or whole, and their products with errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.rendering import Renderer
from ..quantizers.format import Format
from ..quantizers.store import Rows
from . import native_products
from .errors import map_errors


class Gradient(Protocol):
    """Gradients of one matrix [rows, cols], one per sample."""

    @property
    def samples(self) -> int:
        """How many there are."""
        ...

    def pooled(self) -> Gradient:
        """The sum over the samples, as the gradient of a single one."""
        ...

    def touched_rows(self) -> Tensor | None:
        """Rows of the weight whose gradient can be non-zero, sorted; None for all of them."""
        ...

    def gradient(self, rows: Rows) -> Tensor:
        """Gradient of some rows of the weight, per sample: [samples, rows, cols].

        Rows are a slice, or among the sorted :meth:`touched_rows`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """Per-sample factors of a weight gradient, ``G = sum_t delta_t x_t^T``.

    Attributes:
        x: Inputs [samples, positions, channel_groups, cols]; row indices [samples, positions]
            for an embedding.
        delta: Output gradients [samples, positions, channel_groups, rows / channel_groups].
    """

    x: Tensor
    delta: Tensor

    @property
    def samples(self) -> int:
        """See :class:`Gradient`."""
        return len(self.x)

    def pooled(self) -> Factors:
        """See :class:`Gradient`."""
        return Factors(self.x.flatten(0, 1)[None], self.delta.flatten(0, 1)[None])

    def touched_rows(self) -> Tensor | None:
        """See :class:`Gradient`."""
        return None if self.x.is_floating_point() else self.x.unique()

    def gradient(self, rows: Rows) -> Tensor:
        """See :class:`Gradient`."""
        if isinstance(rows, Tensor):
            return self._lookup_gradient(rows)
        if self.delta.shape[2] == 1:
            return self.delta[:, :, 0, rows].transpose(1, 2) @ self.x[:, :, 0]
        per_group = torch.einsum("npgr,npgc->ngrc", self.delta, self.x)
        return per_group.flatten(1, 2)[:, rows]

    def _lookup_gradient(self, rows: Tensor) -> Tensor:
        where = torch.searchsorted(rows, self.x).clamp_(max=len(rows) - 1)
        sample, position = (rows[where] == self.x).nonzero(as_tuple=True)
        result = self.delta.new_zeros(len(self.x), len(rows), self.delta.shape[-1])
        picked = self.delta[sample, position, 0]
        return result.index_put_((sample, where[sample, position]), picked, accumulate=True)


@dataclass(frozen=True, slots=True)
class DenseGradient:
    """The gradient of one sample, as autograd gives it.

    Attributes:
        matrix: The gradient [rows, cols].
        blocks: Experts that the rows divide into, each with as many rows.
    """

    matrix: Tensor
    blocks: int = 1

    @property
    def samples(self) -> int:
        """See :class:`Gradient`."""
        return 1

    def pooled(self) -> DenseGradient:
        """See :class:`Gradient`."""
        return self

    def reached(self) -> Tensor:
        """Which experts have a gradient: bool [blocks]."""
        blocks: Tensor = self.matrix.unflatten(0, (self.blocks, -1))
        return blocks.flatten(1).any(1)

    def touched_rows(self) -> Tensor | None:
        """The rows of experts that have a gradient."""
        reached = self.reached() if self.blocks > 1 else None
        if reached is None or reached.all():
            return None
        rows = torch.arange(len(self.matrix), device=self.matrix.device)
        found: Tensor = rows.unflatten(0, (self.blocks, -1))[reached].flatten()
        return found

    def gradient(self, rows: Rows) -> Tensor:
        """See :class:`Gradient`."""
        return self.matrix[rows][None]


@dataclass(frozen=True)
class Block:
    """Some rows of one matrix: what a product may look at.

    Attributes:
        source: The gradients G_i.
        rows: The rows.
        errors: Rendering errors of all formats [F, rows, cols].
    """

    source: Gradient
    rows: Rows
    errors: Tensor

    @cached_property
    def gradients(self) -> Tensor:
        """Per-sample gradients at the rows [samples, rows * cols]."""
        return self.source.gradient(self.rows).flatten(1)

    @cached_property
    def products(self) -> tuple[Tensor, Tensor]:
        """``<G_i, dW_f>`` and ``sum G_i^2 dW_f^2``, each [samples, F]."""
        gradients, errors = self.gradients, self.errors.flatten(1)
        found = native_products.products(gradients, errors)
        if found is None:
            return gradients @ errors.T, gradients.square() @ errors.square().T
        return found


Product = Callable[[Block], Tensor]  # [samples, F]; the blocks of a matrix are added


def inner(block: Block) -> Tensor:
    """``<G_i, dW_f>``."""
    return block.products[0]


def squared(block: Block) -> Tensor:
    """``sum G_i^2 dW_f^2``."""
    return block.products[1]


def absolute(block: Block) -> Tensor:
    """``sum |G_i dW_f|``."""
    return block.gradients.abs() @ block.errors.flatten(1).abs().T


def gradient_norm(block: Block) -> Tensor:
    """``||G_i||^2``, the same for all formats: an estimate of the trace of the Fisher matrix."""
    return block.gradients.square().sum(1, keepdim=True).expand(-1, len(block.errors))


def gradient_products(
    source: Gradient,
    renderer: Renderer,
    name: str,
    formats: Sequence[Format],
    products: Sequence[Product],
) -> NDArray[np.float64]:
    """Products of per-sample gradients with the rendering errors of all formats.

    Args:
        source: The gradients G_i.
        renderer: Source of the renderings.
        name: The part's name.
        formats: The F formats.
        products: The P products, such as :func:`inner`.

    Returns:
        float64 [P, samples, F].
    """

    def work(rows: Rows, errors: Tensor) -> NDArray[np.float64]:
        block = Block(source, rows, errors)
        return np.stack([product(block).double().cpu().numpy() for product in products])

    blocks = map_errors(work, renderer, name, formats, source.touched_rows())
    return sum(blocks, np.zeros((len(products), source.samples, len(formats))))

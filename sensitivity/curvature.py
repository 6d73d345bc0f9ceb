"""Sums of products of gradients: what an error in a row of a matrix costs, from all sequences.

A sequence with inputs x_t and output gradients d_t, from labels that the model itself sampled, has
the gradient ``G = sum_t d_t x_t^T``, and G^T G is the Fisher information of a row, summed over the
rows. With few tokens it is made without G, from ``X^T (D D^T) X``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import DenseGradient, Factors

BLOCK = 128  # columns: no smaller blocks of a symmetric sum are left out


@dataclass
class Sums:
    """Sums over sequences of one matrix; of those that are symmetric only the lower triangle.

    Attributes:
        forms: ``sequence``, sum_sequences G^T G; ``token``, sum_t |d_t|^2 x_t x_t^T; ``plain``,
            sum_t x_t x_t^T, shared by matrices with the same input; each float32
            [parts, cols, cols]. A gradient that has no factors has the first alone.
        rows: Sum over tokens, or without factors over sequences, of squared gradients, float32
            [rows].
        vectors: How many inputs x_t there were.
    """

    forms: dict[str, Tensor]
    rows: Tensor
    vectors: int = 0

    @classmethod
    def zeros(
        cls, rows: int, parts: int, cols: int, device: torch.device, plain: Tensor | None = None
    ) -> Sums:
        """Nothing summed yet; ``plain`` is None for gradients without factors."""

        def square() -> Tensor:
            return torch.zeros(parts, cols, cols, device=device)

        forms = {"sequence": square()}
        if plain is not None:
            forms |= {"token": square(), "plain": plain}
        return cls(forms, torch.zeros(rows, device=device))

    def add(self, source: Factors, first: int = 0, step: int = 1, *, plain: bool = True) -> None:
        """Add the sequences ``first, first + step, ...`` of some factors.

        Args:
            source: Factors of a product, not of a lookup.
            first: The first sequence to add.
            step: Every how many of them.
            plain: Whether to add to the plain sum, too, which one of those that share it does.
        """
        some = slice(first, None, step)
        x = source.x[some].float().permute(2, 0, 1, 3)  # [parts, samples, tokens, cols]
        delta = source.delta[some].float().permute(2, 0, 1, 3)
        if not x.shape[1]:
            return
        flat = x.flatten(1, 2)
        if x.shape[2] <= delta.shape[3]:
            products = delta @ delta.mT
            power = products.diagonal(dim1=-2, dim2=-1)
            _add(self.forms["sequence"], flat, (products @ x).flatten(1, 2))
        else:
            gradient = (delta.mT @ x).flatten(1, 2)
            power = torch.linalg.vector_norm(delta, dim=-1).square()
            _add(self.forms["sequence"], gradient, gradient)
        _add(self.forms["token"], flat, flat * power.flatten(1)[:, :, None])
        if plain:
            _add(self.forms["plain"], flat, flat)
        self.rows += torch.linalg.vector_norm(delta, dim=(1, 2)).square().flatten()
        self.vectors += flat.shape[1]

    def add_dense(self, source: DenseGradient) -> None:
        """Add the gradient of one sequence."""
        blocks = source.matrix.float().unflatten(0, (source.blocks, -1))
        for i in source.reached().nonzero()[:, 0].tolist():
            _add(self.forms["sequence"][i : i + 1], blocks[i : i + 1], blocks[i : i + 1])
        self.rows += torch.linalg.vector_norm(source.matrix, dim=1).square()


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right, known to be symmetric, to the lower blocks of ``total``.

    Args:
        total: [parts, cols, cols].
        left: [parts, count, cols].
        right: [parts, count, cols].
    """
    cols = total.shape[-1]
    step = max(BLOCK, -(-cols // 4))
    if cols <= step:
        total.baddbmm_(left.mT, right)
        return
    for one, some, other in zip(total, left, right, strict=True):
        for start in range(0, cols, step):
            stop = min(start + step, cols)
            one[start:stop, :stop].addmm_(some[:, start:stop].T, other[:, :stop])

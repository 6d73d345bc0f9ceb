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

BLOCK = 128  # rows at least: smaller products take more time than what they leave out


class Triangle:
    """The lower triangle of symmetric sums [parts, cols, cols], in blocks of rows.

    Args:
        parts: Number of matrices.
        cols: Their size.
        device: Where they are.
    """

    def __init__(self, parts: int, cols: int, device: torch.device) -> None:
        self.shape = (parts, cols, cols)
        self._blocks = {
            start: torch.zeros(parts, stop - start, stop, device=device)
            for start, stop in _rows(cols)
        }

    def add(self, left: Tensor, right: Tensor, first: int = 0) -> None:
        """Add left^T right, known to be symmetric.

        Args:
            left: [some parts, count, cols].
            right: The same.
            first: The first part that they are for.
        """
        for start, block in self._blocks.items():
            stop = block.shape[2]
            some = block[first : first + len(left)]
            ours, theirs = left[:, :, start:stop].mT, right[:, :, :stop]
            if len(some) == 1:
                some[0].addmm_(ours[0], theirs[0])
            else:
                some.baddbmm_(ours, theirs)

    def square(self) -> Tensor:
        """[parts, cols, cols], of which the lower triangle counts."""
        whole = next(iter(self._blocks.values())).new_zeros(self.shape)
        for start, block in self._blocks.items():
            whole[:, start : block.shape[2], : block.shape[2]] = block
        return whole


def entries(cols: int) -> int:
    """Numbers that a :class:`Triangle` has for a matrix."""
    return sum((stop - start) * stop for start, stop in _rows(cols))


def _rows(cols: int) -> list[tuple[int, int]]:
    step = max(BLOCK, -(-cols // 4))
    return [(start, min(start + step, cols)) for start in range(0, cols, step)]


@dataclass
class Sums:
    """Sums over sequences of one matrix.

    Attributes:
        forms: ``sequence``, sum_sequences G^T G; ``token``, sum_t |d_t|^2 x_t x_t^T; ``plain``,
            sum_t x_t x_t^T, shared by matrices with the same input; each float32
            [parts, cols, cols]. A gradient that has no factors has the first alone.
        rows: Sum over tokens, or without factors over sequences, of squared gradients, float32
            [rows].
        vectors: How many inputs x_t there were.
    """

    forms: dict[str, Triangle]
    rows: Tensor
    vectors: int = 0

    @classmethod
    def zeros(
        cls, rows: int, parts: int, cols: int, device: torch.device, plain: Triangle | None = None
    ) -> Sums:
        """Nothing summed yet; ``plain`` is None for gradients without factors."""
        forms = {"sequence": Triangle(parts, cols, device)}
        if plain is not None:
            forms |= {"token": Triangle(parts, cols, device), "plain": plain}
        return cls(forms, torch.zeros(rows, device=device))

    def add(
        self, source: Factors, some: slice | list[int] = slice(None), *, plain: bool = True
    ) -> None:
        """Add sequences of some factors.

        Args:
            source: Factors of a product, not of a lookup.
            some: Which of its sequences.
            plain: Whether to add to the plain sum, too, which one of those that share it does.
        """
        x = source.x[some].float().permute(2, 0, 1, 3)  # [parts, samples, tokens, cols]
        delta = source.delta[some].float().permute(2, 0, 1, 3)
        if not x.shape[1]:
            return
        flat = x.flatten(1, 2)
        if x.shape[2] <= delta.shape[3]:
            products = delta @ delta.mT
            power = products.diagonal(dim1=-2, dim2=-1)
            self.forms["sequence"].add(flat, (products @ x).flatten(1, 2))
        else:
            gradient = (delta.mT @ x).flatten(1, 2)
            power = torch.linalg.vector_norm(delta, dim=-1).square()
            self.forms["sequence"].add(gradient, gradient)
        self.forms["token"].add(flat, flat * power.flatten(1)[:, :, None])
        if plain:
            self.forms["plain"].add(flat, flat)
        self.rows += torch.linalg.vector_norm(delta, dim=(1, 2)).square().flatten()
        self.vectors += flat.shape[1]

    def add_dense(self, source: DenseGradient) -> None:
        """Add the gradient of one sequence."""
        blocks = source.matrix.float().unflatten(0, (source.blocks, -1))
        for i in source.reached().nonzero()[:, 0].tolist():
            self.forms["sequence"].add(blocks[i : i + 1], blocks[i : i + 1], i)
        self.rows += torch.linalg.vector_norm(source.matrix, dim=1).square()

"""Multiplication by a ``PlanePack``: the custom op, and what runs it on which device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import ZERO_KINDS, PlaneClass, PlanePack
from .planes import Cell, Order

ORDERS: tuple[Order, ...] = ("nvidia", "amd")


def plane_linear(x: Tensor, pack: PlanePack, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with the weight W [rows, cols] of a pack.

    Args:
        x: Inputs [..., cols]; float16 or bfloat16 on a GPU.
        pack: The weight, on the device of ``x`` and in the order of its processor family.
        bias: [rows] or None.

    Returns:
        Outputs [..., rows] in the dtype of ``x``.
    """
    outputs: Tensor = plane_linear_op(
        x,
        pack.words,
        pack.scales,
        pack.zeros,
        pack.cells,
        pack.table,
        pack.codebook,
        bias,
        meta_of(pack),
    )
    return outputs


def meta_of(pack: PlanePack) -> list[int]:
    """What the tensors of a pack do not say about it, as integers."""
    meta = [*pack.shape, *pack.cell, ORDERS.index(pack.order)]
    for kind in pack.classes:
        meta += [kind.bits, kind.group, ZERO_KINDS.index(kind.zero)]
    return meta


def pack_of(tensors: Sequence[Tensor | None], meta: Sequence[int]) -> PlanePack:
    """Invert :func:`meta_of`; the tensors are in the order of the fields of a pack."""
    rows, cols, cell_rows, cell_cols, order, *kinds = meta
    classes = tuple(
        PlaneClass(kinds[i], kinds[i + 1], ZERO_KINDS[kinds[i + 2]])
        for i in range(0, len(kinds), 3)
    )
    cell = Cell(cell_rows, cell_cols)
    return PlanePack(*tensors, (rows, cols), cell, classes, ORDERS[order])  # type: ignore[arg-type,call-arg]


@torch.library.custom_op("bitplan::plane_linear", mutates_args=())
def plane_linear_op(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    cells: Tensor,
    table: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    meta: Sequence[int],
) -> Tensor:
    """The op of :func:`plane_linear`: the tensors of a pack, and ``meta_of`` it."""
    pack = pack_of((words, scales, zeros, cells, table, codebook), meta)
    plain = pack.dequantize().to(x.dtype)
    return torch.nn.functional.linear(x, plain, bias)


@plane_linear_op.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    cells: Tensor,
    table: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    meta: Sequence[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], meta[0])

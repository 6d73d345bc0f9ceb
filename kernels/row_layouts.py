"""What a weight whose rows are in several formats becomes for the kernels of one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantizers.format import Format
from ..quantizers.packed import PackedTensor
from .backend import kernel_for
from .gemm import order_of
from .layouts import Layout, PlaneLayout, StoredLayout, prepare
from .packing import PlanePack, choose_row_cell
from .planes import Cell

PackedRows = tuple[
    PackedTensor, Tensor
]  # packed rows, and which rows of the weight they are, int64


@dataclass(frozen=True, slots=True)
class RowsLayout:
    """Layouts of some rows each, side by side.

    Attributes:
        layouts: What multiplies, one after the other.
        rows: The rows of the weight that each of them has, int32.
        order: Where every row of the weight is among all of these, int32.
    """

    layouts: tuple[Layout, ...]
    rows: tuple[Tensor, ...]
    order: Tensor

    @staticmethod
    def of(layouts: Sequence[Layout], rows: Sequence[Tensor], device: torch.device) -> RowsLayout:
        """Layouts with the rows they have; together all rows of the weight, each once."""
        there = [some.to(device, torch.int32) for some in rows]
        order = torch.cat(there).argsort().int()
        return RowsLayout(tuple(layouts), tuple(there), order)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Layout`."""
        outputs = [
            layout.linear(x, None if bias is None else bias[rows])
            for layout, rows in zip(self.layouts, self.rows, strict=True)
        ]
        return torch.cat(outputs, dim=-1).index_select(-1, self.order)


def on_planes(fmt: Format, device: torch.device) -> bool:
    """Whether rows in a format become part of a ``PlanePack`` there."""
    return kernel_for(device) == "triton" and fmt.layout == "codes"


def prepare_rows(parts: Sequence[PackedRows], device: torch.device) -> Layout:
    """The layout of a weight in parts for the chosen kernels of a device.

    The Triton kernels multiply by all parts that have codes at once, whatever their widths; other
    kernels by one part after the other.

    Args:
        parts: Packed rows, and which rows of the weight they are, int64; together all, each once.
        device: Where it will be multiplied.

    Raises:
        ValueError: If ``BITPLAN_KERNEL`` asks for what cannot run there.
    """
    together: list[list[PackedRows]] = []  # one launch each
    alone: list[PackedRows] = []
    for part in parts:
        fmt = part[0].fmt
        if not on_planes(fmt, device):
            alone.append(part)
            continue
        for group in together:  # one table of values each
            if len({None, fmt.levels, *(packed.fmt.levels for packed, _ in group)}) <= 2:
                group.append(part)
                break
        else:
            together.append([part])
    cell = choose_row_cell([packed.shape for packed, _ in parts])
    if len(together) == 1 and not alone:
        return _planes_of_rows(parts, device, cell)
    layouts: list[Layout] = []
    rows: list[Tensor] = []
    for group in together:
        starts = torch.tensor([0, *(len(some) for _, some in group)]).cumsum(0)
        inside = [
            (packed, torch.arange(len(some)) + start)
            for (packed, some), start in zip(group, starts, strict=False)
        ]
        layouts.append(_planes_of_rows(inside, device, cell))
        rows.append(torch.cat([some for _, some in group]))
    layouts += [prepare(packed, device) for packed, _ in alone]
    return RowsLayout.of(layouts, [*rows, *(some for _, some in alone)], device)


def stored_rows(parts: Sequence[PackedRows]) -> Layout:
    """The stored parts themselves, through the custom op: any device, compiled or traced."""
    layouts = [StoredLayout(packed) for packed, _ in parts]
    rows = [some for _, some in parts]
    return RowsLayout.of(layouts, rows, rows[0].device)


def _planes_of_rows(parts: Sequence[PackedRows], device: torch.device, cell: Cell) -> PlaneLayout:
    """One launch for parts with codes: the factors of their corrections stand side by side."""
    here = [
        (PackedTensor(p.fmt, p.shape, {n: t.to(device) for n, t in p.tensors.items()}), rows)
        for p, rows in parts
    ]
    count = sum(len(rows) for _, rows in parts)
    pack = PlanePack.from_rows(here, count, order_of(device), cell)
    corrected = [(packed.tensors, rows) for packed, rows in here if packed.fmt.rank]
    if not corrected:
        return PlaneLayout(pack)
    right = torch.cat([tensors["right"] for tensors, _ in corrected])
    left = right.new_zeros(count, len(right))
    first = 0
    for tensors, rows in corrected:
        rank = tensors["left"].shape[1]
        left[rows.to(device), first : first + rank] = tensors["left"]
        first += rank
    return PlaneLayout(pack, (left, right))

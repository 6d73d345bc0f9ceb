"""PlanePack: a packed weight laid out for matrix instructions, made when a model is loaded.

The weight is cut into row blocks and these into cells (see ``planes``).  Every row block keeps its
cells sorted by class (width, group size, kind of zero point), so one kernel launch runs ``for
class: for cell`` without a branch in a loop, whatever mix of widths the matrix has.  Rows of one
width that are spread over the matrix are gathered into row blocks; their outputs are scattered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..quantizers.format import Format
from ..quantizers.packed import PackedTensor
from .blocks import UNIT, UNIT_BYTES, Block, Part, PlaneClass, ZeroKind, read_zeros
from .planes import CELLS, Cell, Order, unpack_cells

_ROW_BYTES = 16  # of the order of rows in parts: of stored ones, laid out ones, outputs and biases


@dataclass(frozen=True, slots=True, eq=False)
class PlanePack:
    """A weight [rows, cols] of one or more widths, as tensors for ``gemm.plane_linear``.

    Attributes:
        words: The word planes of all cells, int32.
        scales: ``s * 2^b`` (``s`` of a ``table`` class), float16 [scale rows, cell.rows].
        zeros: Zero points of the classes that store them, uint8: per scale row ``cell.rows``
            codes, digit by digit of the width and LSB first, or float16 ``1 + z / 2^b``.
        cells: Column block in the low and scale row in the high 16 bits, int32, sorted by row
            block, class and column.
        table: int32 [row blocks, C + 1, 4]: first cell, first word (in units of 128), first scale
            row and first zero point (in units of 8 bytes) of every class; the last row ends them.
        codebook: float32 [2^b], the values of the codes of ``table`` classes, or None.
        pairs: The values of two codes c + 2^b d as the halves of an int32, rounded to float16
            and to bfloat16 [2, 4^b]; or None.
        targets: Which row of the weight lies in every row of the row blocks, int32 [row blocks *
            cell.rows], where that is another order; rows of the weight for padding.  Or None.
        shape: (rows, cols) of the weight, without padding.
        cell: Shape of a cell.
        classes: What the cells are.
        order: The processor family.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    cells: Tensor
    table: Tensor
    codebook: Tensor | None
    pairs: Tensor | None
    targets: Tensor | None
    shape: tuple[int, int]
    cell: Cell
    classes: tuple[PlaneClass, ...]
    order: Order

    @staticmethod
    def from_packed(
        packed: PackedTensor, order: Order = "nvidia", zero: ZeroKind = "code"
    ) -> PlanePack:
        """Lay out the codes of one packed weight, without a correction that is added to them.

        Raises:
            ValueError: If its format has no codes to lay out.
        """
        levels, codebook = packed.fmt.levels, None
        if levels is not None:
            device = packed.tensors["codes"].device
            codebook = torch.tensor(levels, dtype=torch.float32, device=device)
        block = Block.of(packed, zero=zero)
        return PlanePack.from_blocks([block], packed.shape, order, codebook=codebook)

    @staticmethod
    def from_blocks(
        blocks: Sequence[Block],
        shape: tuple[int, int],
        order: Order = "nvidia",
        cell: Cell | None = None,
        codebook: Tensor | None = None,
    ) -> PlanePack:
        """Lay out a weight made of blocks, which cover it once.

        Args:
            blocks: Its parts; their borders inside the matrix are multiples of the cell.
            shape: (rows, cols) of the whole weight.
            order: The processor family.
            cell: Shape of a cell; by default the one that wastes least.
            codebook: Values of the codes of ``table`` classes [2^b].

        Raises:
            ValueError: If the blocks do not cover the matrix once, borders lie inside cells, a
                scale does not fit float16, or a row has more than 65,535 cells or scales.
        """
        cell = cell or choose_cell(shape, [(block.row, block.col) for block in blocks])
        blocks = sorted(blocks, key=lambda block: (block.row, block.col))
        _check_cover(blocks, shape, cell)
        classes = tuple(sorted({block.kind for block in blocks}))
        _check_codebook(classes, codebook)
        parts = [Part.of(block, cell, order) for block in blocks]
        sizes = torch.zeros(-(-shape[0] // cell.rows), len(classes), 4, dtype=torch.int64)
        before = []  # what its row blocks hold of the same class when a part comes
        for part in parts:
            index = classes.index(part.kind)
            before.append(sizes[part.rows, index].clone())
            sizes[part.rows, index] += part.sizes
        _check_size(shape, sizes)
        ends = sizes.view(-1, 4).cumsum(0).view(sizes.shape)
        firsts = ends - sizes
        device = blocks[0].codes.device
        total = [int(size) for size in ends[-1, -1]]
        words = torch.empty(total[1], UNIT, dtype=torch.int32, device=device)
        scales = torch.empty(total[2], cell.rows, dtype=torch.float16, device=device)
        zeros = torch.empty(total[3], UNIT_BYTES, dtype=torch.uint8, device=device)
        cells = torch.empty(total[0], dtype=torch.int32, device=device)
        for part, done in zip(parts, before, strict=True):
            first = (firsts[part.rows, classes.index(part.kind)] + done).to(device)
            for place, whole, of_part in (
                (0, cells, part.entries(done[:, 2])),
                (1, words, part.words.view(len(first), -1, UNIT)),
                (2, scales, part.scales),
                (3, zeros, part.zeros.view(len(first), -1, UNIT_BYTES)),
            ):
                steps = torch.arange(of_part.shape[1], device=device)
                whole[first[:, place, None] + steps] = of_part
        table = torch.cat([firsts, ends[:, -1:]], dim=1).int().to(device)
        values = (codebook, None if codebook is None else _value_pairs(codebook))
        flat = (words.view(-1), scales, zeros.view(-1), cells, table, *values, None)
        return PlanePack(*flat, shape, cell, classes, order)

    @staticmethod
    def from_rows(
        parts: Sequence[tuple[PackedTensor, Tensor]],
        rows: int,
        order: Order = "nvidia",
        cell: Cell | None = None,
    ) -> PlanePack:
        """Lay out a weight whose rows are in several formats, each in whole row blocks.

        Args:
            parts: Packed rows, and which rows of the weight they are, int64; together all, each
                once.
            rows: Rows of the weight.
            order: The processor family.
            cell: Shape of a cell; by default that of :func:`choose_row_cell`.

        Raises:
            ValueError: If a format has no codes to lay out, or two have values of their own.
        """
        cols = parts[0][0].shape[1]
        cell = cell or choose_row_cell([packed.shape for packed, _ in parts])
        levels = {packed.fmt.levels for packed, _ in parts} - {None}
        if len(levels) > 1:
            raise ValueError("The rows of a weight can share one table of values, not several.")
        blocks: list[Block] = []
        targets = []
        first = 0
        for packed, some in parts:
            blocks.append(Block.of(packed, first).padded(cell.rows))
            missing = -len(some) % cell.rows
            targets.append(torch.nn.functional.pad(some.int(), (0, missing), value=rows))
            first += len(some) + missing
        device = blocks[0].codes.device
        values = [torch.tensor(v, dtype=torch.float32, device=device) for v in levels if v]
        pack = PlanePack.from_blocks(
            blocks, (first, cols), order, cell, codebook=values[0] if values else None
        )
        return replace(pack, shape=(rows, cols), targets=torch.cat(targets).to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; :func:`resident_bytes` knows them in advance."""
        return sum(part.nbytes for part in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, to keep them as the buffers of a module."""
        names = ("words", "scales", "zeros", "cells", "table", "codebook", "pairs", "targets")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device | str) -> PlanePack:
        """The same pack on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in self.tensors().items()}
        return replace(self, **moved)

    @property
    def laid_rows(self) -> int:
        """Rows up to the last one that is not padding, with the padding between them."""
        return self.shape[0] if self.targets is None else len(self.targets)

    def in_order(self, laid: Tensor, dim: int = 0) -> Tensor:
        """Values of all rows as they lie, [.., laid_rows, ..], as those of the weight's rows."""
        if self.targets is None:
            return laid
        where = torch.arange(len(self.targets), device=laid.device)
        order = where.new_empty(self.shape[0] + 1)  # the last is that of some row of padding
        return laid.index_select(dim, order.scatter_(0, self.targets.long(), where)[:-1])

    def dequantize(self) -> Tensor:
        """The weight, float32 [rows, cols]."""
        blocks = [len(self.table), -(-self.shape[1] // self.cell.cols)]
        shape = (blocks[0], blocks[1], *self.cell)
        out = torch.empty(shape, dtype=torch.float32, device=self.words.device)
        for row_block, firsts in enumerate(self.table.tolist()):
            for index in range(len(self.classes)):
                if firsts[index][0] < firsts[index + 1][0]:
                    cells, values = self._values(index, firsts)
                    out[row_block, cells] = values
        plain = out.transpose(1, 2).reshape(blocks[0] * self.cell.rows, -1)
        return self.in_order(plain[: self.laid_rows, : self.shape[1]]).contiguous()

    def _values(self, index: int, firsts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Column blocks [n] and values [n, cell.rows, cell.cols] of a class in a row block."""
        kind, cell = self.classes[index], self.cell
        (cell0, word0, scale0, zero0), (cell1, word1, scale1, zero1) = firsts[index : index + 2]
        entries = self.cells[cell0:cell1]
        planes = self.words[UNIT * word0 : UNIT * word1].view(1, -1, kind.bits, cell.words)
        codes = unpack_cells(planes, cell, self.order).view(cell.rows, -1, cell.cols)
        scale = self.scales[scale0:scale1].float()
        if kind.zero == "table":
            assert self.codebook is not None
            values = self.codebook[codes.long()].transpose(0, 1)
            offset = torch.zeros_like(scale)
        else:
            values = codes.transpose(0, 1).float() / 2**kind.bits
            stored = self.zeros[UNIT_BYTES * zero0 : UNIT_BYTES * zero1].view(len(scale), -1)
            offset = read_zeros(stored, kind, cell.rows, scale)
        groups = kind.scale_rows(cell.cols, cell)  # in one cell
        rows = ((entries >> 16) & 0xFFFF)[:, None] + torch.arange(groups, device=entries.device)
        values = values.view(-1, cell.rows, groups, cell.cols // groups)
        offset, scale = (part[rows].transpose(1, 2)[..., None] for part in (offset, scale))
        return entries.long() & 0xFFFF, ((values - offset) * scale).flatten(2)


def choose_cell(shape: tuple[int, int], corners: Sequence[tuple[int, int]] = ((0, 0),)) -> Cell:
    """The cell that pads a weight [rows, cols] least, the largest of equals.

    Args:
        shape: (rows, cols) of the weight.
        corners: Where its blocks begin; these are multiples of the cell.

    Raises:
        ValueError: If a block begins at no multiple of 64.
    """

    def padded(cell: Cell) -> int:
        return math.prod(-(-size // side) * side for size, side in zip(shape, cell, strict=True))

    fitting = [c for c in CELLS if all(row % c.rows + col % c.cols == 0 for row, col in corners)]
    if not fitting:
        row, col = next((r, c) for r, c in corners if r % 64 or c % 64)
        raise ValueError(
            f"A block begins at row {row}, column {col}; blocks of a weight must begin at "
            "multiples of 64."
        )
    return min(fitting, key=padded)


def choose_row_cell(shapes: Sequence[tuple[int, int]]) -> Cell:
    """The cell that pads parts [rows, cols] of one weight least, the largest of equals."""
    return min(
        CELLS,
        key=lambda cell: (
            sum(-(-rows // cell.rows) * cell.rows for rows, _ in shapes)
            * (-(-shapes[0][1] // cell.cols) * cell.cols)
        ),
    )


def resident_bytes(
    fmt: Format,
    shape: tuple[int, int],
    zero: ZeroKind = "code",
    cell: Cell | None = None,
    parts: Sequence[tuple[int, int]] = (),
) -> int:
    """Bytes of a weight [rows, cols] in memory, ready to compute with.

    For a format of codes the bytes of its ``PlanePack``, whatever the processor family, and of its
    low-rank correction; for any other what is stored, which is computed with as it is.

    Args:
        fmt: The format.
        shape: (rows, cols).
        zero: How zero points are kept, if any: ``code`` or ``half``.
        cell: Shape of a cell; by default the one that wastes least.
        parts: Shapes of all parts of a matrix, if the weight is one of these; it takes at most so
            many bytes then, whatever the formats of the others.
    """
    if fmt.layout != "codes":
        return fmt.stored_bytes(shape) + (_ROW_BYTES * shape[0] if parts else 0)
    cell = cell or (choose_row_cell(parts) if parts else choose_cell(shape))
    kind = PlaneClass.of(fmt, zero)
    row_blocks, col_blocks = -(-shape[0] // cell.rows), -(-shape[1] // cell.cols)
    per_cell = 4 * kind.bits * cell.words + 4
    per_scale_row = 2 * cell.rows + kind.zero_bytes(cell)
    table = 2 * 4 * 4
    rows = shape[0]
    if parts:  # a class more per part, at most
        table = (len(parts) + 1) * 4 * 4 + _ROW_BYTES * cell.rows
        rows = sum(count for count, _ in parts)
    scales = kind.scale_rows(shape[1], cell) * per_scale_row
    values = 0 if fmt.levels is None else 4 * len(fmt.levels) + 8 * len(fmt.levels) ** 2
    correction = 2 * min(fmt.rank, *shape) * (rows + shape[1])
    return row_blocks * (col_blocks * per_cell + scales + table) + values + correction


def _check_cover(blocks: Sequence[Block], shape: tuple[int, int], cell: Cell) -> None:
    covered = torch.zeros([-(-size // side) for size, side in zip(shape, cell, strict=True)])
    for row, col, codes, *_ in blocks:
        rows, cols = codes.shape
        inside = (row % cell.rows, col % cell.cols) == (0, 0) and all(
            end == whole or (end < whole and end % side == 0)
            for end, whole, side in zip((row + rows, col + cols), shape, cell, strict=True)
        )
        if not inside:
            raise ValueError(
                f"A block [{rows}, {cols}] at row {row}, column {col} does not consist of whole "
                f"{cell.rows} x {cell.cols} cells of a weight {list(shape)}. Choose other borders."
            )
        covered[
            row // cell.rows : -(-(row + rows) // cell.rows),
            col // cell.cols : -(-(col + cols) // cell.cols),
        ] += 1
    if not torch.all(covered == 1):
        row, col = (int(i) for i in (covered != 1).nonzero()[0])
        raise ValueError(
            f"The blocks cover row {row * cell.rows}, column {col * cell.cols} of a weight "
            f"{list(shape)} {int(covered[row, col])} times. Give blocks that cover it once."
        )


def _value_pairs(codebook: Tensor) -> Tensor:
    """The values of all pairs of codes as float16 and bfloat16 halves: int32 [2, 4^b]."""
    low, high = codebook.repeat(len(codebook)), codebook.repeat_interleave(len(codebook))
    pairs = torch.stack([low, high], dim=1)
    return torch.stack(
        [pairs.to(dtype).view(torch.int32)[:, 0] for dtype in (torch.float16, torch.bfloat16)]
    )


def _check_codebook(classes: Sequence[PlaneClass], codebook: Tensor | None) -> None:
    widths = {kind.bits for kind in classes if kind.zero == "table"}
    given = 0 if codebook is None else len(codebook)
    if any(width > 4 or 2**width != given for width in widths):
        raise ValueError(
            f"Codes of {sorted(widths)} bits index a table of {given} values. Give one width of "
            "at most 4 bits, and a codebook of 2^bits values."
        )


def _check_size(shape: tuple[int, int], sizes: Tensor) -> None:
    """An entry of ``cells`` has 16 bits for the column block and for the scale row."""
    most = int(sizes[..., [0, 2]].amax())
    if most > 0xFFFF:
        raise ValueError(
            f"A row of a weight {list(shape)} has {most} cells or scales; 65,535 are the most."
        )

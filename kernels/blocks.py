"""Blocks: parts of a matrix in one format, and how they lie in the cells of a ``PlanePack``."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..quantizers.format import Format
from ..quantizers.packed import PackedTensor, pack_bits, unpack_bits
from .planes import Cell, Order, digits, pack_cells

WHOLE_ROW = 0  # the group size of one scale per row
UNIT = 128  # words; the words of every cell are a multiple
UNIT_BYTES = 8  # likewise for zero points

ZeroKind = Literal["none", "code", "half", "table"]
ZERO_KINDS: tuple[ZeroKind, ...] = ("none", "code", "half", "table")


class PlaneClass(NamedTuple):
    """What the cells of one class have in common; classes sort by width.

    Attributes:
        bits: Width b of a code.
        group: Columns per scale; ``WHOLE_ROW`` for one scale per row.
        zero: Zero points: implicit (``none``), b-bit codes (``code``), float16 (``half``), or
            none because the codes index a table of values (``table``).
    """

    bits: int
    group: int
    zero: ZeroKind

    @staticmethod
    def of(fmt: Format, zero: ZeroKind = "code") -> PlaneClass:
        """The class of a format of codes; ``zero`` says how to keep its zero points, if any."""
        if fmt.levels is not None:
            zero = "table"
        elif fmt.symmetric:
            zero = "none"
        return PlaneClass(fmt.bits, max(fmt.group_size, WHOLE_ROW), zero)

    @property
    def implicit_zero(self) -> float:
        """The zero point of ``none``, as ``Format.zero_point``: 2^(b-1), and 1/2 for one bit."""
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    def scale_rows(self, cols: int, cell: Cell) -> int:
        """Scales per row of a block with this many columns, cells padded."""
        if self.group == WHOLE_ROW:
            return 1
        if self.group >= cell.cols:
            return math.ceil(cols / self.group)
        return math.ceil(cols / cell.cols) * (cell.cols // self.group)

    def zero_bytes(self, cell: Cell) -> int:
        """Bytes of the zero points of one scale row."""
        return {"code": self.bits * cell.rows // 8, "half": 2 * cell.rows}.get(self.zero, 0)


class Block(NamedTuple):
    """A part of a matrix: a run of rows and columns of one class.

    Attributes:
        row: Its first row.
        col: Its first column; groups count from it.
        codes: uint8 [rows, cols], below 2^bits.
        scale: [rows, groups], or [1, 1] for a single one.
        zero: Zero points like ``scale`` for ``code`` (integers below 2^bits) and ``half`` (any
            number); None otherwise.
        kind: The class.
    """

    row: int
    col: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    kind: PlaneClass

    @staticmethod
    def of(packed: PackedTensor, row: int = 0, col: int = 0, zero: ZeroKind = "code") -> Block:
        """The codes of a packed weight at some place of a larger one.

        Args:
            packed: The weight, in a format of codes.
            row: Its first row there.
            col: Its first column there.
            zero: How to keep its zero points, if any: ``code`` or ``half``.

        Raises:
            ValueError: If its format has no codes.
        """
        grid = packed.grid()
        if grid is None or packed.fmt.layout != "codes":
            raise ValueError(f"A {packed.fmt} weight has no codes to lay out. Use it as it is.")
        codes = unpack_bits(packed.tensors["codes"], packed.fmt.bits, packed.shape[1])
        return Block(row, col, codes, grid.scale, grid.zero, PlaneClass.of(packed.fmt, zero))

    def padded(self, rows: int) -> Block:
        """The same block with zeros below it up to a multiple of ``rows``."""
        missing = -len(self.codes) % rows

        def longer(values: Tensor) -> Tensor:  # a single scale is that of all rows
            return values if values.shape == (1, 1) else pad(values, (0, 0, 0, missing))

        zero = None if self.zero is None else longer(self.zero)
        codes = pad(self.codes, (0, 0, 0, missing))
        return self._replace(codes=codes, scale=longer(self.scale), zero=zero)


class Part(NamedTuple):
    """A block in the layout: R row blocks of C cells with G scale rows.

    Attributes:
        kind: The class.
        rows: The row blocks in the whole weight.
        col: The first column block there.
        words: int32 [R, C, b, words].
        scales: float16 [R, G, cell.rows].
        zeros: uint8 [R, G, zero bytes].
        scale_row: The first scale row of every cell [C], int32.
    """

    kind: PlaneClass
    rows: slice
    col: int
    words: Tensor
    scales: Tensor
    zeros: Tensor
    scale_row: Tensor

    @staticmethod
    def of(block: Block, cell: Cell, order: Order) -> Part:
        """Lay out a block.

        Raises:
            ValueError: If a scale does not fit float16.
        """
        kind = block.kind
        rows, cols = block.codes.shape
        codes = pad(block.codes, (0, -cols % cell.cols, 0, -rows % cell.rows))
        words = pack_cells(codes, kind.bits, cell, order)
        count = kind.scale_rows(cols, cell)

        def by_row_block(values: Tensor) -> Tensor:  # [rows or 1, groups] -> [R, G, cell.rows]
            full = values.expand(rows, -1)
            full = pad(full, (0, count - full.shape[1], 0, -rows % cell.rows))
            return full.view(-1, cell.rows, count).transpose(1, 2).contiguous()

        scale = block.scale.float() * (1 if kind.zero == "table" else 2**kind.bits)
        if not scale.abs().amax() <= torch.finfo(torch.float16).max:
            raise ValueError(
                f"A scale of {float(block.scale.abs().amax()):g} is too large to be laid out: "
                f"times 2^{kind.bits} it must be below 65504. Keep this weight in fp16."
            )
        scales = by_row_block(scale.half())
        if block.zero is None:
            zeros = torch.empty(*scales.shape[:2], 0, dtype=torch.uint8, device=scales.device)
        else:
            zeros = write_zeros(by_row_block(block.zero), kind)
        starts = torch.arange(words.shape[1], device=words.device, dtype=torch.int32) * cell.cols
        scale_row = torch.zeros_like(starts) if kind.group == WHOLE_ROW else starts // kind.group
        first = slice(block.row // cell.rows, block.row // cell.rows + words.shape[0])
        return Part(kind, first, block.col // cell.cols, words, scales, zeros, scale_row)

    @property
    def sizes(self) -> Tensor:
        """Cells, words, scale rows and zero points of a row block, in the units of the table."""
        cells, groups = self.words.shape[1], self.scales.shape[1]
        words, zeros = self.words[0].numel() // UNIT, self.zeros[0].numel() // UNIT_BYTES
        return torch.tensor([cells, words, groups, zeros])

    def entries(self, scale_rows: Tensor) -> Tensor:
        """What ``cells`` says about the cells [R, C], after so many scale rows [R]."""
        cols = torch.arange(self.words.shape[1], device=self.words.device) + self.col
        scale_row = self.scale_row + scale_rows.to(cols.device)[:, None]
        return (cols + (scale_row << 16)).int()


def write_zeros(zeros: Tensor, kind: PlaneClass) -> Tensor:
    """Zero points [R, G, rows] as stored: uint8 [R, G, zero bytes]."""
    row_blocks, groups, rows = zeros.shape
    if kind.zero == "half":
        shifted = (1 + zeros.float() / 2.0**kind.bits).half()
        return shifted.contiguous().view(torch.uint8)
    codes, found, bit = zeros.reshape(-1, rows).to(torch.uint8), [], 0
    for digit in digits(kind.bits):
        found.append(pack_bits((codes >> bit) & ((1 << digit) - 1), digit))
        bit += digit
    return torch.cat(found, dim=1).view(row_blocks, groups, -1)


def read_zeros(stored: Tensor, kind: PlaneClass, rows: int, like: Tensor) -> Tensor:
    """``z / 2^b`` [G, rows] of zero points stored as [G, zero bytes]."""
    if kind.zero == "none":
        return torch.full_like(like, kind.implicit_zero / 2**kind.bits)
    if kind.zero == "half":
        return stored.view(torch.float16).float() - 1
    codes, byte, bit = torch.zeros_like(like), 0, 0
    for digit in digits(kind.bits):
        size = digit * rows // 8
        codes += unpack_bits(stored[:, byte : byte + size], digit, rows).float() * 2**bit
        byte += size
        bit += digit
    return codes / 2.0**kind.bits

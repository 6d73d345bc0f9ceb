"""The bit layout of plane packing: where every bit of every code of a cell lies.

A *cell* is a block of 128 or 64 rows by 128 or 64 columns of one width b.  It takes exactly b bits
per weight: b *word planes* of ``rows * cols / 32`` int32 words, and the same word of all planes
holds 32 codes.  The planes are grouped as the binary digits of b, ``8 | 4 | 2 | 1`` (3 = 2 + 1):
a digit p keeps p bits of the code in p words.

A word holds 16 *slots* of two halves; the halves are the codes of columns k and k + 1, 16 bits
apart, so ``(word >> shift) & (mask * 0x00010001)`` yields two neighbours: the register pair that a
tensor core takes.  Slots of the digits 2 and 1 are nibble-major (slot t lies in nibble t % 4), so
three-bit codes merge to nibbles a whole word at a time.

Words are stored in the order in which the lanes of a matrix instruction hold their operand, so
that a 16-byte load per lane is all there is between memory and the multiplication:

- ``nvidia``: m16n8k16; a lane holds rows n, n + 8 and columns 2r, 2r + 1 (+ 8).
- ``amd``: 16x16x16 MFMA; a lane holds one row and columns 4r ... 4r + 3.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SLOTS = 16

Order = Literal["nvidia", "amd"]
ORDERS: tuple[Order, ...] = ("nvidia", "amd")


class Cell(NamedTuple):
    """The shape of a cell: 128 or 64 rows and columns."""

    rows: int
    cols: int

    @property
    def word_rows(self) -> int:
        """Rows of the [word_rows, 4] words of one plane; a word covers 128 / cols rows."""
        return self.rows * self.cols // 128

    @property
    def words(self) -> int:
        """Words of one plane."""
        return 4 * self.word_rows


CELLS = (Cell(128, 128), Cell(64, 128), Cell(128, 64), Cell(64, 64))


class Field(NamedTuple):
    """Some bits of the code in one slot: ``width`` bits at ``shift`` of a word plane.

    Attributes:
        plane: The word plane, below b.
        shift: Position of the lowest bit in the half word.
        width: 8, 4, 2 or 1.
        bit: Position of the lowest bit in the code.
    """

    plane: int
    shift: int
    width: int
    bit: int


def digits(bits: int) -> list[int]:
    """The binary digits of a width, largest first: 7 -> [4, 2, 1]."""
    return [digit for digit in (8, 4, 2, 1) if bits & digit]


def fields(bits: int, slot: int) -> list[Field]:
    """Where the code in slot 0 ... 15 lies, low code bits first."""
    found, plane, bit = [], 0, 0
    for width in digits(bits):
        if width >= 4:
            place = slot * width
            shift, offset = place % 16, place // 16
        elif width == 2:
            shift, offset = 4 * (slot % 4) + 2 * (slot // 4 % 2), slot // 8
        else:
            shift, offset = 4 * (slot % 4) + slot // 4, 0
        found.append(Field(plane + offset, shift, width, bit))
        plane += width
        bit += width
    return found


def pack_cells(codes: Tensor, bits: int, cell: Cell, order: Order) -> Tensor:
    """Pack codes into cells.

    Args:
        codes: Codes below 2^bits [rows, cols], uint8; whole cells.
        bits: b, from 1 to 8.
        cell: Shape of a cell.
        order: The processor family.

    Returns:
        Words [rows / cell.rows, cols / cell.cols, b, cell.words], int32.
    """
    slots = _to_slots(codes, cell, order)  # [2, 16, row block, column block, words]
    blocks = slots.shape[2:4]
    words = torch.zeros((*blocks, bits, cell.words), dtype=torch.int32, device=codes.device)
    for slot in range(SLOTS):
        pair = slots[0, slot].int() | (slots[1, slot].int() << 16)
        for plane, shift, width, bit in fields(bits, slot):
            mask = ((1 << width) - 1) * 0x00010001
            words[:, :, plane] |= ((pair >> bit) & mask) << shift
    return words


def unpack_cells(words: Tensor, cell: Cell, order: Order) -> Tensor:
    """Invert :func:`pack_cells`: words [R, C, b, cell.words] -> codes uint8 [rows, cols]."""
    row_blocks, col_blocks, bits, _ = words.shape
    shape = (2, SLOTS, row_blocks, col_blocks, cell.words)
    slots = torch.zeros(shape, dtype=torch.uint8, device=words.device)
    for slot in range(SLOTS):
        for half in range(2):
            for plane, shift, width, bit in fields(bits, slot):
                part = (words[:, :, plane] >> (shift + 16 * half)) & ((1 << width) - 1)
                slots[half, slot] |= (part << bit).to(torch.uint8)
    return _from_slots(slots, cell, order)


def _dims(cell: Cell, order: Order) -> tuple[list[int], list[int], list[int]]:
    """Row dims, column dims of a cell, and the axes that make them [half, slot, word].

    The axes count row dims from 0 and column dims after them.  Rows are (slot part, top, middle,
    ..., low), columns (slot part, r, ...).
    """
    lanes = cell.word_rows
    spans = 128 // cell.cols  # rows of a word
    if order == "nvidia":
        rows = [spans, 2, lanes // 32, 2, 8]  # span, top, middle, n3, low
        cols = [cell.cols // 8, 4, 2]  # slot, r, half
        return rows, cols, [7, 0, 5, 2, 4, 6, 1, 3]
    top = 4 if lanes >= 64 else 2
    rows = [spans, top, lanes // (16 * top), 16]  # span, top, middle, low
    cols = [cell.cols // 16, 4, 2, 2]  # slot high, r, slot low, half
    return rows, cols, [7, 0, 4, 6, 2, 5, 3, 1]


def _to_slots(codes: Tensor, cell: Cell, order: Order) -> Tensor:
    rows, cols, axes = _dims(cell, order)
    row_blocks, col_blocks = codes.shape[0] // cell.rows, codes.shape[1] // cell.cols
    split = codes.view(row_blocks, *rows, col_blocks, *cols)
    block = 1 + len(rows)  # the axis of column blocks
    moved = [axis + 1 if axis < len(rows) else axis + 2 for axis in axes]
    slots = split.permute(*moved[: _slot_axes(order)], 0, block, *moved[_slot_axes(order) :])
    return slots.reshape(2, SLOTS, row_blocks, col_blocks, cell.words)


def _from_slots(slots: Tensor, cell: Cell, order: Order) -> Tensor:
    rows, cols, axes = _dims(cell, order)
    _, _, row_blocks, col_blocks, _ = slots.shape
    sizes = rows + cols
    lead = _slot_axes(order)
    split = slots.reshape(
        *(sizes[a] for a in axes[:lead]), row_blocks, col_blocks, *(sizes[a] for a in axes[lead:])
    )
    position = {axis: i if i < lead else i + 2 for i, axis in enumerate(axes)}
    back = [lead, *(position[a] for a in range(len(rows)))]
    back += [lead + 1, *(position[len(rows) + a] for a in range(len(cols)))]
    return split.permute(back).reshape(row_blocks * cell.rows, col_blocks * cell.cols)


def _slot_axes(order: Order) -> int:
    """How many leading axes of ``_dims`` make up the half and the slot."""
    return 3 if order == "nvidia" else 4

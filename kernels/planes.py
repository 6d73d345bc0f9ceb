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

import functools
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
    row_blocks, col_blocks = codes.shape[0] // cell.rows, codes.shape[1] // cell.cols
    neighbours = codes.contiguous().view(torch.int16)  # two codes each
    split = neighbours.view(row_blocks, cell.rows, col_blocks, cell.cols // 2).transpose(1, 2)
    split = split.reshape(row_blocks * col_blocks, -1)
    places = _places(cell, order).to(codes.device).expand(len(split), -1)
    slots = split.gather(1, places).view(len(split), SLOTS, cell.words).int()
    slots = (slots & 0xFF) | ((slots & 0xFF00) << 8)  # one code in each half
    words = torch.zeros(len(split), bits, cell.words, dtype=torch.int32, device=codes.device)
    for slot in range(SLOTS):
        for plane, shift, width, bit in fields(bits, slot):
            mask = ((1 << width) - 1) * 0x00010001
            words[:, plane] |= ((slots[:, slot] >> bit) & mask) << shift
    return words.view(row_blocks, col_blocks, bits, cell.words)


def unpack_cells(words: Tensor, cell: Cell, order: Order) -> Tensor:
    """Invert :func:`pack_cells`: words [R, C, b, cell.words] -> codes uint8 [rows, cols]."""
    row_blocks, col_blocks, bits, _ = words.shape
    words = words.view(-1, bits, cell.words)
    slots = torch.zeros(len(words), SLOTS, cell.words, dtype=torch.int32, device=words.device)
    for slot in range(SLOTS):
        for plane, shift, width, bit in fields(bits, slot):
            mask = ((1 << width) - 1) * 0x00010001
            slots[:, slot] |= ((words[:, plane] >> shift) & mask) << bit
    neighbours = ((slots & 0xFF) | ((slots >> 8) & 0xFF00)).to(torch.int16).view(len(words), -1)
    places = _places(cell, order).to(words.device).expand(len(words), -1)
    split = torch.empty_like(neighbours).scatter_(1, places, neighbours)
    split = split.view(row_blocks, col_blocks, cell.rows, cell.cols // 2).transpose(1, 2)
    return split.reshape(row_blocks * cell.rows, -1).view(torch.uint8)


@functools.cache
def _places(cell: Cell, order: Order) -> Tensor:
    """For every slot and word [16 * words]: which pair of neighbours of a cell lies there."""
    lanes, spans = cell.word_rows, 128 // cell.cols  # a word covers ``spans`` rows
    pairs = torch.arange(cell.rows * cell.cols // 2)
    if order == "nvidia":
        # span, highest, middle, n3, low | slot, r  ->  span, slot | middle, low, r, highest, n3
        split = pairs.view(spans, 2, lanes // 32, 2, 8, cell.cols // 8, 4)
        return split.permute(0, 5, 2, 4, 6, 1, 3).flatten()
    top = 4 if lanes >= 64 else 2
    # span, highest, middle, low | slot, r, slot  ->  span, slot | middle, r, low, highest
    split = pairs.view(spans, top, lanes // (16 * top), 16, cell.cols // 16, 4, 2)
    return split.permute(0, 4, 6, 2, 5, 3, 1).flatten()

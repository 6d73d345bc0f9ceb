"""From word planes to tiles of a matrix instruction, in registers (Triton device functions).

A float16 has ten bits of mantissa: a code c of b bits put at their top, with the exponent of 1,
*is* the number 1 + c / 2^b.  That takes a shift and one three-input logic instruction for two
weights; scale and zero point are applied to the accumulator, once per group.  Where two codes fit
the mantissa four bits apart (b <= 6, or b <= 3 in bfloat16), slots t and t + 1 share the shift: the
lower one gets the exponent of 16 and is the number 16 + c / 2^b.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _shift(word, by: tl.constexpr):
    # An arithmetic shift will do: the sign bits that come in are masked away.
    if by > 0:
        word = word >> by
    if by < 0:
        word = word << (-by)
    return word


@triton.jit
def _merge(field, code, FIRST: tl.constexpr, AMD: tl.constexpr):
    # The fields are disjoint.  Alternating ^ and | keeps LLVM from reordering the chain, which
    # would cost NVIDIA its three-input instruction; AMD has one for "and, or".
    if FIRST and not AMD:
        return field ^ code
    return field | code


@triton.jit
def _nibbles3(a, b, c):
    """The 32 codes of a two-bit digit (a, b) and a one-bit digit c as nibbles of four words."""
    return (
        (a & 0x33333333) ^ ((c << 2) & 0x44444444),
        ((a >> 2) & 0x33333333) ^ ((c << 1) & 0x44444444),
        (b & 0x33333333) ^ (c & 0x44444444),
        ((b >> 2) & 0x33333333) ^ ((c >> 1) & 0x44444444),
    )


@triton.jit
def gather_digits(words, BITS: tl.constexpr):
    """Make the digits 2 + 1 of three- and seven-bit codes nibbles, like the digit 4."""
    if BITS == 3:
        words = _nibbles3(words[0], words[1], words[2])
    if BITS == 7:
        words = (words[0], words[1], words[2], words[3]) + _nibbles3(words[4], words[5], words[6])
    return words


@triton.jit
def pair_code(
    words, code, t: tl.constexpr, BITS: tl.constexpr, AT: tl.constexpr, AMD: tl.constexpr
):
    """Merge into ``code`` the two codes of slot t, their lowest bits at ``AT`` of the halves."""
    if BITS & 8:
        field = _shift(words[t // 2], (t % 2) * 8 - AT) & (0x00FF00FF << AT)
        code = _merge(field, code, True, AMD)
    if BITS & 4:
        field = _shift(words[t // 4], (t % 4) * 4 - AT) & (0x000F000F << AT)
        code = _merge(field, code, True, AMD)
    if BITS & 3 == 3:
        ABOVE: tl.constexpr = AT + (BITS & 4)
        field = _shift(words[(BITS & 4) + t // 4], (t % 4) * 4 - ABOVE) & (0x00070007 << ABOVE)
        code = _merge(field, code, BITS == 3, AMD)
    elif BITS & 2:
        ABOVE2: tl.constexpr = AT + (BITS & 4)
        place: tl.constexpr = (t % 4) * 4 + t // 4 % 2 * 2
        field = _shift(words[(BITS & 4) + t // 8], place - ABOVE2) & (0x00030003 << ABOVE2)
        code = _merge(field, code, BITS == 2, AMD)
    elif BITS & 1:
        ABOVE1: tl.constexpr = AT + (BITS & 4)
        field = _shift(words[BITS & 4], (t % 4) * 4 + t // 4 - ABOVE1) & (0x00010001 << ABOVE1)
        code = _merge(field, code, BITS == 1, AMD)
    return code


@triton.jit
def _slot(words, magic, pairs, t: tl.constexpr, FORM: tl.constexpr):
    """The two numbers of slot t as the halves of an int32, separated."""
    BITS: tl.constexpr = FORM[0]
    TOP: tl.constexpr = FORM[1]
    KIND: tl.constexpr = FORM[2]
    AMD: tl.constexpr = FORM[3]
    if KIND == 0:
        LOWER: tl.constexpr = 4 * (1 - t % 2) if FORM[4] else 0
        code = magic[0] if LOWER == 0 else magic[1]
        code = pair_code(words, code, t, BITS, TOP - BITS - LOWER, AMD)
    elif KIND == 1:  # a table of pairs
        code = pair_code(words, words[0] & 0, t, BITS, 0, AMD)
        code = tl.load(pairs + ((code | (code >> (16 - BITS))) & ((1 << (2 * BITS)) - 1)))
    elif KIND == 2:  # the upper half of an 8-bit code that does not fit a bfloat16
        field = _shift(words[t // 2], (t % 2) * 8 + 4 - (TOP - 4)) & (0x000F000F << (TOP - 4))
        code = _merge(field, magic[0], True, AMD)
    else:  # its lower half, in sixteenths
        field = _shift(words[t // 2], (t % 2) * 8 - (TOP - 4)) & (0x000F000F << (TOP - 4))
        code = _merge(field, magic[2], True, AMD)
    return code.to(tl.int16), (code >> 16).to(tl.int16)


@triton.jit
def _slots2(words, magic, pairs, t: tl.constexpr, STEP: tl.constexpr, FORM: tl.constexpr):
    a, b = _slot(words, magic, pairs, t, FORM)
    c, d = _slot(words, magic, pairs, t + STEP, FORM)
    return tl.join(a, c), tl.join(b, d)


@triton.jit
def _strip(words, magic, pairs, t: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Slots t ... t + 3 as a tile [ROWS, 32] of int16, columns in order."""
    a, b = _slots2(words, magic, pairs, t, 2, FORM)
    c, d = _slots2(words, magic, pairs, t + 1, 2, FORM)
    tile = tl.join(tl.join(a, c), tl.join(b, d))  # row, r, slot / 2, slot % 2, half
    if FORM[3] or FORM[5]:
        tile = tile.permute(0, 2, 1, 3, 4)
    else:
        tile = tile.permute(0, 2, 3, 1, 4)
    return tile.reshape(ROWS, 32)


@triton.jit
def tile(
    words,
    magic,
    pairs,
    u: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Columns 32 u ... 32 u + 31 of a cell [ROWS, COLS] as int16 [ROWS, 32]; registers only.

    Args:
        words: The word planes after ``gather_digits``, each [word rows, 4].
        magic: The exponents of 1, 16 and 1/16, in both halves.
        pairs: Pointer to the table of value pairs.
        u: Which columns.
        FORM: (width, bits of mantissa, 0 for integers or 1 for a table or 2, 3 for halves of
            8-bit codes, whether the order is AMD's, whether slots share shifts in pairs, whether
            columns come as ``wide_place`` says).
        ROWS: Rows of a cell.
        COLS: Its columns.
    """
    if COLS == 128:
        whole = _strip(words, magic, pairs, 4 * u, FORM, ROWS)
    else:
        upper = _strip(words, magic, pairs, 4 * u, FORM, ROWS // 2)
        lower = _strip(words, magic, pairs, 4 * u + 8, FORM, ROWS // 2)
        whole = tl.join(upper, lower).permute(2, 0, 1).reshape(ROWS, 32)
    return whole


@triton.jit
def wide_place(column):
    """Where a column lies if a lane holds four neighbours of each sixteen: 0 1 8 9, 2 3 10 11, ...

    The order of words gives a lane the columns 2 r, 2 r + 1, 2 r + 8, 2 r + 9.  A compiler that
    wants its operand to be 4 r ... 4 r + 3 gets these instead, and the inputs in the same order.
    """
    return column // 16 * 16 + column % 8 // 2 * 4 + column % 16 // 8 * 2 + column % 2


@triton.jit
def load_plane(pointers, ROWS: tl.constexpr, COLS: tl.constexpr, AMD: tl.constexpr):
    """A word plane of a cell as [word rows, 4]; the lanes already hold what they will need."""
    LANES: tl.constexpr = ROWS * COLS // 128
    words = tl.load(pointers)
    if AMD:
        TOP: tl.constexpr = 4 if LANES >= 64 else 2
        words = words.reshape(LANES // (16 * TOP), 4, 16, TOP).permute(3, 0, 2, 1)
    else:
        words = words.reshape(LANES // 32, 8, 4, 2, 2).permute(3, 0, 4, 1, 2)
    return words.reshape(LANES, 4)


@triton.jit
def load_zero(zeros, row_in_cell, base, BITS: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr):
    """``1 + z / 2^b`` of the rows of a scale row, float32; ``base`` is its first byte."""
    if ZERO == 2:
        half = (zeros + base).to(tl.pointer_type(tl.float16))
        zero = tl.load(half + row_in_cell).to(tl.float32)
    else:
        zero = _load_code(zeros + base, row_in_cell, BITS, ROWS)
    return zero


@triton.jit
def _load_code(bytes, row, BITS: tl.constexpr, ROWS: tl.constexpr):
    """``1 + z / 2^b`` from the digits of z, by its bits: no conversion to float."""
    code = tl.full(row.shape, 0x3F800000, tl.int32)
    if BITS & 8:
        code = code | (tl.load(bytes + row).to(tl.int32) << (23 - BITS))
    if BITS & 4:
        field = tl.load(bytes + row // 2).to(tl.int32) >> (row % 2 * 4)
        code = code | ((field & 15) << (23 - BITS))
    if BITS & 2:
        at2: tl.constexpr = ROWS * (BITS & 4) // 8
        field = tl.load(bytes + at2 + row // 4).to(tl.int32)
        code = code | (((field >> (row % 4 * 2)) & 3) << (23 - BITS + (BITS & 4)))
    if BITS & 1:
        at1: tl.constexpr = ROWS * (BITS & 6) // 8
        field = tl.load(bytes + at1 + row // 8).to(tl.int32)
        code = code | (((field >> (row % 8)) & 1) << (23 - BITS + (BITS & 6)))
    return code.to(tl.float32, bitcast=True)

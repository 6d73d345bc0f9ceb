"""Kernels that the static check must refuse: what plane packing is measured against.

They compile and are never launched.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from ..triton_tiles import _shift, load_plane


@triton.jit
def broadcast_gemm(
    x,
    words,
    scales,
    zeros,
    out,
    M,
    N,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The common way: packed words [K / (32 / b), N], loaded once per *weight*.

    Every word is requested by all weights in it, codes become floats by conversion, and
    dequantized weights reach the matrix instruction through shared memory.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLS)
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    x_at = x + token[:, None] * K + column[None, :]
    words_at = words + (column[:, None] // PER_WORD) * N + row[None, :]
    shift = ((column % PER_WORD) * BITS)[:, None]
    for first in tl.range(0, K, COLS, num_stages=STAGES):
        inputs = tl.load(x_at, mask=(token < M)[:, None], other=0.0)
        scale = tl.load(scales + (first // GROUP) * N + row)[None, :]
        zero = tl.load(zeros + (first // GROUP) * N + row)[None, :]
        codes = (tl.load(words_at) >> shift) & ((1 << BITS) - 1)
        acc = tl.dot(inputs, (codes.to(x.dtype.element_ty) - zero) * scale, acc)
        x_at += COLS
        words_at += (COLS // PER_WORD) * N
    at = out + token[:, None] * N + row[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(token < M)[:, None])


@triton.jit
def _bits(words, t: tl.constexpr, BITS: tl.constexpr, magic):
    """Slot t of pure bit planes: word j holds bit j of all codes."""
    code = magic
    for j in tl.static_range(BITS):
        word = _shift(words[j], t - (10 - BITS + j))
        code = (word & (0x00010001 << (10 - BITS + j))) | code
    return code.to(tl.int16), (code >> 16).to(tl.int16)


@triton.jit
def bit_plane_gemm(
    x,
    words,
    scales,
    constants,
    out,
    M,
    N,
    K,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Plane packing with one plane per bit: the same bytes, a shift and a merge per *bit*."""
    WORDS: tl.constexpr = ROWS * 4
    row = tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)[None, :]
    magic = tl.load(constants)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    pointers = words + tl.program_id(0) * (K // 128) * BITS * WORDS
    pointers = tl.multiple_of(pointers, 32) + tl.arange(0, WORDS)
    columns = tl.arange(0, 32)[:, None]
    for cell in tl.range(0, K // 128, num_stages=STAGES):
        planes = ()
        for plane in tl.static_range(BITS):
            planes = planes + (load_plane(pointers + plane * WORDS, ROWS, 128, False),)
        scale = tl.load(scales + (tl.program_id(0) * (K // 128) + cell) * ROWS + row)
        part = tl.zeros((ROWS, TOKENS), tl.float32)
        for u in tl.static_range(4):
            a, b = _bits(planes, 4 * u, BITS, magic)
            c, d = _bits(planes, 4 * u + 1, BITS, magic)
            e, f = _bits(planes, 4 * u + 2, BITS, magic)
            g, h = _bits(planes, 4 * u + 3, BITS, magic)
            low = tl.join(tl.join(a, e), tl.join(c, g))
            high = tl.join(tl.join(b, f), tl.join(d, h))
            weights = tl.join(low, high).permute(0, 2, 3, 1, 4).reshape(ROWS, 32)
            inputs = tl.load(x + token * K + cell * 128 + u * 32 + columns)
            part = tl.dot(weights.to(tl.float16, bitcast=True), inputs, part)
        acc += scale.to(tl.float32)[:, None] * part
        pointers += BITS * WORDS
    at = out + token * N + (tl.program_id(0) * ROWS + row)[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=token < M)

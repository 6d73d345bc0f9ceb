"""The Triton kernels of plane packing: multiply, finish, sum groups, dequantize.

Constexpr arguments that describe a pack are tuples with an entry per class: ``BITS``, ``SUBS``
(columns of a cell that share a scale) and ``ZEROS`` (the index of the kind of zero point).
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .triton_tiles import gather_digits, load_plane, load_zero, tile, wide_place


@triton.jit
def _total(at, stride, COUNT: tl.constexpr):
    total = tl.load(at)
    for more in tl.static_range(1, COUNT):
        total += tl.load(at + more * stride)
    return total


@triton.jit
def _class(
    acc,
    x,
    sums,
    words,
    scales,
    zeros,
    cells,
    pairs,
    magic,
    row,
    tokens,
    x_rows,
    first,
    end,
    begin_cell,
    begin_word,
    begin_scale,
    begin_zero,
    sums_stride,
    excess_at,
    BITS: tl.constexpr,
    SUB: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SUM: tl.constexpr,
    AMD: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the product with the cells ``first`` ... ``end`` - 1 of one class to ``acc``."""
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    TOP: tl.constexpr = 10 if HALF else 7
    TWICE: tl.constexpr = BITS == 8 and not HALF and ZERO != 3
    PAIRED: tl.constexpr = BITS + 4 <= TOP and ZERO != 3
    KIND: tl.constexpr = 1 if ZERO == 3 else (2 if TWICE else 0)
    FORM: tl.constexpr = (BITS, TOP, KIND, AMD, PAIRED, WIDE)
    LOW: tl.constexpr = (BITS, TOP, 3, AMD, False, WIDE)
    WORDS: tl.constexpr = ROWS * COLS // 32
    ZERO_BYTES: tl.constexpr = ROWS * BITS // 8 if ZERO == 1 else 2 * ROWS
    pointers = words + begin_word.to(tl.int64) * 128 + (first - begin_cell) * (BITS * WORDS)
    pointers = tl.multiple_of(pointers, 32) + tl.arange(0, WORDS)
    columns = tl.arange(0, 32)[:, None]
    for i in tl.range(first, end, num_stages=2 * STAGES + 1):
        entry = tl.load(cells + i)
        column = entry & 0xFFFF
        scale_row = (entry >> 16) & 0xFFFF
        planes = ()
        for plane in tl.static_range(BITS):
            planes = planes + (load_plane(pointers + plane * WORDS, ROWS, COLS, AMD),)
        planes = gather_digits(planes, BITS)
        x_cell = x + tl.multiple_of(column * COLS, COLS) + x_rows + columns
        for group in tl.static_range(COLS // SUB):
            scale = tl.load(scales + (begin_scale + scale_row + group) * ROWS + row)
            scale = scale.to(tl.float32)[:, None]
            part = tl.zeros(acc.shape, tl.float32)
            if ZERO != 3:
                at = sums + (column * COLS + group * SUB) // SUM * sums_stride + tokens
                total = _total(at, sums_stride, SUB // SUM)
                excess = tl.zeros(total.shape, tl.float32)
                if PAIRED:
                    excess = _total(at + excess_at, sums_stride, SUB // SUM)
                if TWICE:
                    excess = total * 0.0625
                if ZERO == 0:
                    excess += total * (1.25 if BITS == 1 else 1.5)
                part = tl.broadcast_to(-excess, acc.shape)
            for u in tl.static_range(group * SUB // 32, (group + 1) * SUB // 32):
                inputs = tl.load(x_cell + u * 32)
                if UPCAST:  # the interpreter multiplies the raw bits of bfloat16
                    inputs = inputs.to(tl.float32)
                weights = tile(planes, magic, pairs, u, FORM, ROWS, COLS)
                weights = weights.to(x.dtype.element_ty, bitcast=True)
                if UPCAST:
                    weights = weights.to(tl.float32)
                part = tl.dot(weights, inputs, part)
                if TWICE:
                    weights = tile(planes, magic, pairs, u, LOW, ROWS, COLS)
                    weights = weights.to(x.dtype.element_ty, bitcast=True)
                    if UPCAST:
                        weights = weights.to(tl.float32)
                    part = tl.dot(weights, inputs, part)
            if ZERO == 1 or ZERO == 2:
                byte = begin_zero * 8 + (scale_row + group) * ZERO_BYTES
                zero = load_zero(zeros, row, byte, BITS, ZERO, ROWS)[:, None]
                part -= zero * total
            acc += scale * part
        pointers += BITS * WORDS
    return acc


@triton.jit(do_not_specialize=("M", "sums_stride", "excess_at", "splits"))
def plane_gemm(
    x,
    sums,
    words,
    scales,
    zeros,
    cells,
    table,
    pairs,
    constants,
    bias,
    targets,
    out,
    M,
    N,
    x_stride,
    sums_stride,
    excess_at,
    splits,
    BITS: tl.constexpr,
    SUBS: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SUM: tl.constexpr,
    AMD: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    SCATTERED: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``x @ W.T + bias``, or its parts over K in float32.

    Grid: (row blocks, splits, blocks of ``TOKENS`` tokens).  Weights are the left operand, so one
    token is padded to eight columns of a matrix instruction, not to sixteen.

    Args:
        x: [M, K], float16 or bfloat16, K padded to whole cells.
        sums: float32 [2, G, sums_stride]: sums of x over ``SUM`` columns, and 15 times the sums
            over its columns in even slots, at ``excess_at``.
        words: As in ``PlanePack``, like ``scales``, ``zeros``, ``cells`` and ``table``.
        scales: See there.
        zeros: See there.
        cells: See there.
        table: See there.
        pairs: Values of pairs of codes, int32.
        constants: Both halves the exponent of 1, 16 and 1/16, int32.
        bias: [N]; only read if ``BIAS``.
        targets: As in ``PlanePack``; only read if ``SCATTERED``.
        out: [splits, M, N].
        M: Tokens.
        N: Rows of the weight, without padding.
        x_stride: Elements between tokens.
        sums_stride: Elements between groups of ``sums``.
        excess_at: Elements between both parts of ``sums``.
        splits: Parts that K is cut into.
        BITS: Widths of the classes.
        SUBS: Columns of a cell per scale.
        ZEROS: Kinds of zero points.
        ROWS: Rows of a cell.
        COLS: Columns of a cell.
        SUM: Columns per group of ``sums``.
        AMD: Whether the order of the words is AMD's.
        TOKENS: Tokens of a block.
        STAGES: Cells in flight.
        BIAS: Whether to add ``bias``.
        SCATTERED: Whether the rows of the weight lie in another order, given by ``targets``.
        WIDE: Whether the columns of x lie in the order of ``wide_place``.
        UPCAST: Whether the interpreter runs this in bfloat16.
    """
    CLASSES: tl.constexpr = len(BITS)
    row_block = tl.program_id(0)
    split = tl.program_id(1)
    magic = (tl.load(constants), tl.load(constants + 1), tl.load(constants + 2))
    row = tl.arange(0, ROWS)
    token = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS))[None, :]
    some = tl.minimum(token, M - 1)  # tokens beyond the last repeat it, and are not stored
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for index in tl.static_range(CLASSES):
        entry = table + (row_block * (CLASSES + 1) + index) * 4
        begin = tl.load(entry)
        count = tl.load(entry + 4) - begin
        part = (split + index) % splits  # so that what does not divide evenly spreads out
        acc = _class(
            acc,
            x,
            sums,
            words,
            scales,
            zeros,
            cells,
            pairs,
            magic,
            row,
            some,
            some * x_stride,
            begin + count * part // splits,
            begin + count * (part + 1) // splits,
            begin,
            tl.load(entry + 1),
            tl.load(entry + 2),
            tl.load(entry + 3),
            sums_stride,
            excess_at,
            BITS[index],
            SUBS[index],
            ZEROS[index],
            ROWS,
            COLS,
            SUM,
            AMD,
            STAGES,
            WIDE,
            UPCAST,
        )
    rows = row_block * ROWS + row
    if SCATTERED:
        rows = tl.load(targets + rows)  # padding has N
    if BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    at = split.to(tl.int64) * M * N + token * N + rows[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(token < M) & (rows < N)[:, None])


@triton.jit(do_not_specialize=("M", "excess_at"))
def plane_sums(
    x,
    sums,
    ordered,
    M,
    K,
    x_stride,
    excess_at,
    SUM: tl.constexpr,
    AMD: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What ``plane_gemm`` subtracts: sums of x over groups, and 15 times those of even slots.

    Grid: (groups, blocks of ``TOKENS`` tokens).  If ``WIDE``, ``ordered`` [M, K] gets x with its
    columns in the order of ``wide_place``.
    """
    group = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = group * SUM + tl.arange(0, SUM)
    inside = (token < M)[:, None] & (column < K)[None, :]
    values = tl.load(x + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if WIDE:
        to = ordered + token[:, None] * K + wide_place(column)[None, :]
        tl.store(to, values, mask=inside)
    values = values.to(tl.float32)
    even = (column // (2 if AMD else 8)) % 2 == 0
    at = sums + group * M + token
    tl.store(at, tl.sum(values, axis=1), mask=token < M)
    excess = 15 * tl.sum(tl.where(even[None, :], values, 0.0), axis=1)
    tl.store(at + excess_at, excess, mask=token < M)


@triton.jit(do_not_specialize=("M", "splits"))
def plane_finish(
    parts,
    out,
    bias,
    x,
    starts,
    columns,
    values,
    down,
    up,
    M,
    N,
    x_stride,
    RANK,
    splits,
    BIAS: tl.constexpr,
    SPARSE: tl.constexpr,
    LOW_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add up [splits, M, N] in order, and what else belongs to the output: no atomics.

    Grid: (blocks of ``ROWS`` rows, blocks of ``TOKENS`` tokens).

    Args:
        parts: [splits, M, N].
        out: [M, N].
        bias: [N]; only read if ``BIAS``.
        x: [M, K]; only read if ``SPARSE``.
        starts: Compressed sparse rows S [N, K] to add to the weight: starts of its rows [N + 1].
        columns: Their columns, int32.
        values: Their values.
        down: [M, RANK], the input through the first factor; only read if ``LOW_RANK``.
        up: [N, RANK], the second factor.
        M: Tokens.
        N: Rows of the weight.
        x_stride: Elements between tokens.
        RANK: Columns of the factors.
        splits: Parts to add.
        BIAS: Whether there is a bias.
        SPARSE: Whether there are sparse rows.
        LOW_RANK: Whether there are factors.
        ROWS: Rows of a program.
        TOKENS: Its tokens.
        UPCAST: Whether the interpreter runs this in bfloat16.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[None, :]
    inside = (row < N)[:, None] & (token < M)
    at = token * N + row[:, None]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for _ in tl.range(splits):
        acc += tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
        parts += M * N
    if BIAS:
        acc += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    if SPARSE:
        start = tl.load(starts + row, mask=row < N, other=0)
        end = tl.load(starts + row + 1, mask=row < N, other=0)
        for i in tl.range(tl.max(end - start)):
            some = start + i < end
            column = tl.load(columns + start + i, mask=some, other=0)
            value = tl.load(values + start + i, mask=some, other=0.0).to(tl.float32)
            inputs = tl.load(x + token * x_stride + column[:, None], mask=inside, other=0.0)
            acc += value[:, None] * inputs.to(tl.float32)
    if LOW_RANK:
        for first in tl.range(0, RANK, 16):
            rank = first + tl.arange(0, 16)
            left = tl.load(
                up + row[:, None] * RANK + rank[None, :],
                mask=(row < N)[:, None] & (rank < RANK)[None, :],
                other=0.0,
            )
            right = tl.load(
                down + token * RANK + rank[:, None],
                mask=(token < M) & (rank < RANK)[:, None],
                other=0.0,
            )
            if UPCAST:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            acc = tl.dot(left, right, acc)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_class(
    words,
    scales,
    zeros,
    cells,
    entry,
    pairs,
    magic,
    out,
    row,
    to,
    written,
    K,
    slices,
    BITS: tl.constexpr,
    SUB: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    AMD: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Write the weights of one class in a row block, whose places are at ``entry``."""
    WORDS: tl.constexpr = ROWS * COLS // 32
    FORM: tl.constexpr = (BITS, 10, 1 if ZERO == 3 else 0, AMD, False, False)
    ZERO_BYTES: tl.constexpr = ROWS * BITS // 8 if ZERO == 1 else 2 * ROWS
    begin = tl.load(entry)
    pointers = words + tl.load(entry + 1).to(tl.int64) * 128
    pointers = tl.multiple_of(pointers, 32) + tl.arange(0, WORDS)
    for i in tl.range(begin + tl.program_id(1), tl.load(entry + 4), slices):
        cell = tl.load(cells + i)
        scale_row = (cell >> 16) & 0xFFFF
        planes = ()
        for plane in tl.static_range(BITS):
            at = pointers + ((i - begin) * BITS + plane) * WORDS
            planes = planes + (load_plane(at, ROWS, COLS, AMD),)
        planes = gather_digits(planes, BITS)
        for group in tl.static_range(COLS // SUB):
            scale = tl.load(scales + (tl.load(entry + 2) + scale_row + group) * ROWS + row)
            scale = scale.to(tl.float32)[:, None]
            if ZERO == 0:
                zero = tl.full((ROWS,), 1.25 if BITS == 1 else 1.5, tl.float32)
            elif ZERO == 3:
                zero = tl.zeros((ROWS,), tl.float32)
            else:
                byte = tl.load(entry + 3) * 8 + (scale_row + group) * ZERO_BYTES
                zero = load_zero(zeros, row, byte, BITS, ZERO, ROWS)
            for u in tl.static_range(group * SUB // 32, (group + 1) * SUB // 32):
                weights = tile(planes, magic, pairs, u, FORM, ROWS, COLS)
                weights = weights.to(TABLE if ZERO == 3 else tl.float16, bitcast=True)
                weights = weights.to(tl.float32)
                weights = (weights - zero[:, None]) * scale
                column = (cell & 0xFFFF) * COLS + u * 32 + tl.arange(0, 32)[None, :]
                weights = weights.to(out.dtype.element_ty)
                tl.store(out + to + column, weights, mask=written & (column < K))


@triton.jit(do_not_specialize=("first_block", "N", "slices"))
def plane_dequantize(
    words,
    scales,
    zeros,
    cells,
    table,
    pairs,
    constants,
    out,
    first_block,
    N,
    K,
    slices,
    BITS: tl.constexpr,
    SUBS: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    AMD: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Write the weights of some row blocks as plain numbers, in the order they lie: out [rows, K].

    Grid: (row blocks, slices).  ``N`` counts padding between rows; ``TABLE`` is the dtype of
    numbers from a table; all others come as float16.  The others are those of ``plane_gemm``.
    """
    CLASSES: tl.constexpr = len(BITS)
    block = tl.program_id(0)
    magic = (tl.load(constants), tl.load(constants + 1), tl.load(constants + 2))
    row = tl.arange(0, ROWS)
    to = (block * ROWS + row).to(tl.int64)[:, None] * K
    written = ((first_block + block) * ROWS + row < N)[:, None]
    for index in tl.static_range(CLASSES):
        _dequantize_class(
            words,
            scales,
            zeros,
            cells,
            table + ((first_block + block) * (CLASSES + 1) + index) * 4,
            pairs,
            magic,
            out,
            row,
            to,
            written,
            K,
            slices,
            BITS[index],
            SUBS[index],
            ZEROS[index],
            ROWS,
            COLS,
            AMD,
            TABLE,
        )

"""Running the Triton kernels of plane packing on tensors."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a multiply-add per accumulator, not two

import triton
import triton.language as tl

from .blocks import ZERO_KINDS
from .packing import PlanePack
from .triton_kernels import plane_dequantize, plane_finish, plane_gemm, plane_sums

INTERPRETED = triton.knobs.runtime.interpret
# Triton 3.6 and 3.7 give a lane four neighbours of the left operand where it is made of two joined
# tensors; ours has two, and without the same order of both operands it would be shuffled.
WIDE = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)
_CHUNK_BYTES = 64 << 20  # of a dequantized weight at a time
_EXPONENTS = {
    torch.float16: (0x3C003C00, 0x4C004C00, 0x2C002C00),  # 1, 16 and 1/16 in both halves
    torch.bfloat16: (0x3F803F80, 0x41804180, 0x3D803D80),
}


class Launch(NamedTuple):
    """How ``plane_gemm`` runs.

    Attributes:
        tokens: Tokens of a program.
        warps: Warps of a program; those that the order of the words was made for, or twice.
        stages: Cells in flight.
        splits: Parts that K is cut into.
    """

    tokens: int
    warps: int
    stages: int
    splits: int


class Extras(NamedTuple):
    """What a weight has besides its cells; None where it has not.

    Attributes:
        starts: Compressed sparse rows to add to the weight: starts [N + 1], int32.
        columns: Their columns, int32.
        values: Their values.
        down: First factor [rank, K] of a low-rank addition ``up @ down``.
        up: Second factor [N, rank].
    """

    starts: Tensor | None = None
    columns: Tensor | None = None
    values: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None


def multiply(
    x: Tensor,
    pack: PlanePack,
    bias: Tensor | None,
    extras: Extras,
    launch: Launch,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x @ W.T + bias`` for few tokens, without dequantizing.

    Args:
        x: [M, K], float16 or bfloat16.
        pack: The weight W [N, K].
        bias: [N] or None.
        extras: What W has besides.
        launch: How to run.
        dtype: Of the result; that of ``x`` by default.

    Returns:
        [M, N].
    """
    tokens, rows = len(x), pack.shape[0]
    inputs = _whole_cells(x, pack)
    kinds, amd = _kinds(pack), pack.order == "amd"
    smallest = min(kinds["SUBS"])
    groups = inputs.shape[1] // smallest
    sums = torch.empty(2, groups, tokens, dtype=torch.float32, device=x.device)
    wide = WIDE and not amd
    ordered = torch.empty(inputs.shape, dtype=x.dtype, device=x.device) if wide else inputs
    if wide or any(zero != ZERO_KINDS.index("table") for zero in kinds["ZEROS"]):
        plane_sums[groups, triton.cdiv(tokens, 16)](
            inputs,
            sums,
            ordered,
            tokens,
            inputs.shape[1],
            inputs.stride(0),
            groups * tokens,
            SUM=smallest,
            AMD=amd,
            TOKENS=16,
            WIDE=wide,
        )
    direct = launch.splits == 1 and extras == Extras()
    result = dtype or x.dtype
    out = torch.empty(
        launch.splits,
        tokens,
        rows,
        dtype=result if direct else torch.float32,
        device=x.device,
    )
    plane_gemm[pack.table.shape[0], launch.splits, triton.cdiv(tokens, launch.tokens)](
        ordered,
        sums,
        pack.words,
        pack.scales,
        pack.zeros,
        pack.cells,
        pack.table,
        _pairs(pack, x.dtype),
        _exponents(x.dtype, x.device),
        bias if direct and bias is not None else x,
        pack.cells if pack.targets is None else pack.targets,
        out,
        tokens,
        rows,
        ordered.stride(0) if tokens > 1 else inputs.shape[1],
        tokens,
        groups * tokens,
        launch.splits,
        **kinds,
        ROWS=pack.cell.rows,
        COLS=pack.cell.cols,
        SUM=smallest,
        AMD=amd,
        TOKENS=launch.tokens,
        STAGES=launch.stages,
        BIAS=direct and bias is not None,
        SCATTERED=pack.targets is not None,
        WIDE=wide,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        num_warps=launch.warps,
        num_stages=2 * launch.stages + 1,
    )
    return out[0] if direct else finish(out, inputs, bias, extras, result)


def finish(
    parts: Tensor, x: Tensor, bias: Tensor | None, extras: Extras, dtype: torch.dtype
) -> Tensor:
    """Add parts [splits, M, N] in their order, bias and extras: [M, N] of ``dtype``."""
    splits, tokens, rows = parts.shape
    out = torch.empty(tokens, rows, dtype=dtype, device=parts.device)
    nothing = parts
    through, rank = nothing, 0
    if extras.down is not None and extras.up is not None:
        down = extras.down.to(x.dtype)
        through, rank = x[:, : down.shape[1]] @ down.T, len(down)
    sparse = extras.starts is not None
    plane_finish[triton.cdiv(rows, 64), triton.cdiv(tokens, 16)](
        parts,
        out,
        nothing if bias is None else bias,
        x,
        extras.starts if sparse else nothing,
        extras.columns if sparse else nothing,
        extras.values if sparse else nothing,
        through,
        nothing if extras.up is None else extras.up.to(x.dtype),
        tokens,
        rows,
        x.stride(0),
        rank,
        splits,
        BIAS=bias is not None,
        SPARSE=sparse,
        LOW_RANK=rank > 0,
        ROWS=64,
        TOKENS=16,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
    )
    return out


def dequantize_blocks(pack: PlanePack, first: int, end: int, dtype: torch.dtype) -> Tensor:
    """The row blocks ``first`` ... ``end`` - 1 of a weight, as they lie, as numbers [rows, K]."""
    rows = min(end * pack.cell.rows, pack.laid_rows) - first * pack.cell.rows
    out = torch.empty(rows, pack.shape[1], dtype=dtype, device=pack.words.device)
    number = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    slices = min(8, triton.cdiv(pack.shape[1], pack.cell.cols))
    plane_dequantize[end - first, slices](
        pack.words,
        pack.scales,
        pack.zeros,
        pack.cells,
        pack.table,
        _pairs(pack, number),
        _exponents(torch.float16, pack.words.device),
        out,
        first,
        pack.laid_rows,
        pack.shape[1],
        slices,
        **_kinds(pack),
        ROWS=pack.cell.rows,
        COLS=pack.cell.cols,
        AMD=pack.order == "amd",
        TABLE=tl.bfloat16 if number == torch.bfloat16 else tl.float16,
        num_warps=natural_warps(pack),
    )
    return out


def multiply_dense(
    x: Tensor, pack: PlanePack, bias: Tensor | None, extras: Extras, dtype: torch.dtype
) -> Tensor:
    """``x @ W.T + bias`` for many tokens: dequantize some rows of W, multiply, and go on.

    Args:
        x: [M, K]; any floating dtype, which is that of the product.
        pack: The weight.
        bias: [N] or None.
        extras: What W has besides.
        dtype: Of the result.

    Returns:
        [M, N].
    """
    step = max(1, _CHUNK_BYTES // (pack.cell.rows * pack.shape[1] * x.element_size()))
    out = torch.empty(len(x), pack.laid_rows, dtype=x.dtype, device=x.device)
    for first in range(0, pack.table.shape[0], step):
        end = min(first + step, pack.table.shape[0])
        plain = dequantize_blocks(pack, first, end, x.dtype)
        start = first * pack.cell.rows
        torch.mm(x, plain.T, out=out[:, start : start + len(plain)])
    out = pack.in_order(out, dim=1)
    if extras == Extras():
        return out.to(dtype) if bias is None else (out + bias).to(dtype)
    return finish(out[None], x, bias, extras, dtype)


def natural_warps(pack: PlanePack) -> int:
    """The warps whose lanes load 16 bytes of every word plane, two at most."""
    lanes = pack.cell.words // 4
    return max(1, min(2, lanes // (64 if pack.order == "amd" else 32)))


def _whole_cells(x: Tensor, pack: PlanePack) -> Tensor:
    """``x`` [M, K] with columns to the end of the last cell and rows that begin at 16 bytes."""
    missing = -pack.shape[1] % pack.cell.cols
    if missing:
        return pad(x, (0, missing))
    aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if x.stride(1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _kinds(pack: PlanePack) -> dict[str, tuple[int, ...]]:
    """The constexpr arguments with an entry per class."""
    cols = pack.cell.cols
    return {
        "BITS": tuple(kind.bits for kind in pack.classes),
        "SUBS": tuple(min(kind.group or cols, cols) for kind in pack.classes),
        "ZEROS": tuple(ZERO_KINDS.index(kind.zero) for kind in pack.classes),
    }


def _pairs(pack: PlanePack, dtype: torch.dtype) -> Tensor:
    """The values of pairs of codes; any tensor if there is no table."""
    if pack.pairs is None:
        return pack.cells
    return pack.pairs[0 if dtype == torch.float16 else 1]


@functools.cache
def _exponents(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The exponents of 1, 16 and 1/16, read from memory.

    As a constant of the kernel they would take the one immediate operand that the three-input
    logic instruction has for its mask.
    """
    return torch.tensor(_EXPONENTS[dtype], dtype=torch.int32, device=device)

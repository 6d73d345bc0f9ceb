"""Trellis codes: weights turned into normal ones, and walks through a trellis that follow them.

A state is the last twelve bits of the codes of a column, from row to row, and stands for a value
(:func:`table`).  So b bits a weight choose among many more values than 2^b, and the algorithm of
Viterbi finds the best walk.  Columns are rounded one after the other with feedback, then once more
each while all others stay, which raises the cost of no column.

References:
    Tseng et al. (2024), "QTIP: quantization with trellises and incoherence processing"; Viterbi
    (1967), "Error bounds for convolutional codes"; Marcellin and Fischer (1990), "Trellis coded
    quantization of memoryless and Gauss-Markov sources".
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import native_trellis, rounding
from .feedback import Quadratic, factor
from .lines import row_chunks
from .native_rounding import warn
from .packed import pack_bits, unpack_bits

STATE_BITS = 12  # whole codes of 2, 3 and 4 bits
TILE = 1024  # rows of a walk: each begins in the same state
LEAST = 0.03  # of the mean, what a row counts: walks pass by what counts for nothing
COLUMNS = 8  # walks at a time without compiled loops


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def table(bits: int) -> tuple[float, ...]:
    """What the 2^12 states stand for: quantiles of the normal distribution, exact in float16.

    The 2^b states that may follow a state are spread evenly in probability, from an offset that
    depends on it as if at random; so each state alone is a quantizer of b bits.
    """
    return _table(bits)


@cache
def _table(bits: int) -> tuple[float, ...]:
    width, prefixes = 2**bits, 2 ** (STATE_BITS - bits)
    mixed = _mixed(np.arange(prefixes, dtype=np.uint64))
    offset = (mixed.argsort(kind="stable").argsort() + 0.5) / prefixes
    turned = np.arange(width)[None, :] ^ (mixed[:, None] >> np.uint64(20)).astype(np.int64) % width
    shares = ((turned + offset[:, None]) / width).reshape(-1)
    quantile = NormalDist().inv_cdf
    return tuple(float(np.float16(quantile(float(share)))) for share in shares)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def start(bits: int) -> int:
    """The state before the first row: the one that is followed by the most central values."""
    values = np.array(table(bits)).reshape(-1, 2**bits)
    prefix = int(np.abs(values.sum(1)).argmin())
    return prefix  # its low bits are what the next state keeps


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Whole numbers below 2^32 as if at random: the finalizer of MurmurHash3."""
    mask = np.uint64(0xFFFFFFFF)
    numbers = numbers * np.uint64(0x9E3779B1) & mask
    for multiplier, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(multiplier) & mask
    return numbers ^ (numbers >> np.uint64(16))


# ------------------------------------------------------------------ weights without directions


def turned(matrix: Tensor) -> Tensor:
    """M T [rows, cols] for the orthogonal T that spreads every direction over all columns.

    Columns get signs as if at random, and a Hadamard transform mixes the first 2^k of them, 2^k the
    largest power of two there is in ``cols``; then likewise the last 2^k.
    """
    result = torch.empty_like(matrix)
    steps = _steps(matrix.shape[1], matrix.device)
    for rows in row_chunks(matrix.shape):
        block = matrix[rows]
        for signs, span in steps:
            block = block * signs
            block[:, span] = _hadamard(block[:, span])
        result[rows] = block
    return result


def turned_back(matrix: Tensor) -> Tensor:
    """M T^-1 [rows, cols]; a row is the same whichever others come along."""
    result = torch.empty_like(matrix)
    steps = _steps(matrix.shape[1], matrix.device)
    for rows in row_chunks(matrix.shape):
        block = matrix[rows].clone()
        for signs, span in reversed(steps):
            block[:, span] = _hadamard(block[:, span])
            block *= signs
        result[rows] = block
    return result


def _steps(cols: int, device: torch.device) -> list[tuple[Tensor, slice]]:
    """Signs of all columns, and the columns that are mixed after that."""
    size = 1 << (cols.bit_length() - 1)
    steps = []
    spans = [slice(0, size)] if size == cols else [slice(0, size), slice(cols - size, cols)]
    for i, span in enumerate(spans):
        steps.append((torch.tensor(_signs(cols, i), device=device), span))
    return steps


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _signs(cols: int, step: int) -> tuple[float, ...]:
    numbers = np.arange(cols, dtype=np.uint64) + np.uint64((step + 1) << 20)
    return tuple(1.0 if number & 1 else -1.0 for number in _mixed(numbers).tolist())


def _hadamard(block: Tensor) -> Tensor:
    """Rows of a power of two columns times the orthogonal Hadamard matrix, which is its inverse."""
    rows, size = block.shape
    half = 1
    block = block.contiguous()
    while half < size:
        low, high = block.view(rows, -1, 2, half).unbind(2)
        block = torch.stack([low + high, low - high], 2).view(rows, size)
        half *= 2
    result: Tensor = block * float(size) ** -0.5
    return result


# ------------------------------------------------------------------ codes


class Coded(NamedTuple):
    """What is kept of a weight: its codes, and which of its rows are meant.

    Attributes:
        codes: Packed, uint8 [all rows, bytes].
        scale: float16 [all rows, 1].
        which: Numbers of the rows that are meant, int64; None for all.
    """

    codes: Tensor
    scale: Tensor
    which: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> Coded:
        """The same for some rows of the weight."""
        every = self.which
        if every is None:
            every = torch.arange(len(self.codes), device=self.codes.device)
        return self._replace(which=every[rows])


def levels(codes: Tensor, index: Tensor | None, bits: int, cols: int) -> Tensor:
    """What rows of packed codes stand for in units of their scales, float32 [n, cols], turned."""
    values = torch.tensor(table(bits), dtype=torch.float32, device=codes.device)
    if index is None:
        index = torch.arange(len(codes), device=codes.device)
    result = torch.empty(len(index), cols, device=codes.device)
    first = start(bits)
    for some in row_chunks(result.shape):
        rows = index[some]
        within = rows % TILE
        state = torch.zeros(len(rows), cols, dtype=torch.int32, device=codes.device)
        for back in range(STATE_BITS // bits):
            earlier = unpack_bits(codes[(rows - back).clamp_(min=0)], bits, cols).int()
            outside = (back - within - 1)[:, None].int()  # codes before the walk began
            code = first >> (bits * outside.clamp(min=0)) & (2**bits - 1)
            state |= torch.where(outside >= 0, code, earlier) << (bits * back)
        result[some] = values[state]
    return result


def decode(fitted: Coded, bits: int, cols: int) -> Tensor:
    """The weight [n, cols], float32."""
    scale = fitted.scale if fitted.which is None else fitted.scale[fitted.which]
    return turned_back(levels(fitted.codes, fitted.which, bits, cols).mul_(scale.float()))


def encode(
    weight: Tensor, bits: int, hessian: Tensor | None, counts: Tensor | None, damping: float
) -> Coded:
    """Codes and scales with little ``sum_r counts_r E_r H E_r^T``.

    Args:
        weight: [rows, cols], float32.
        bits: b.
        hessian: H [cols, cols]; None for plain squared errors.
        counts: [rows]; None for ones.
        damping: What is added to the diagonal of H, as a multiple of its mean.

    Weights on other devices come to the CPU for its compiled loops, where there are any.
    """
    device, (rows, cols) = weight.device, weight.shape
    if device.type != "cpu" and native_trellis.LIBRARY.find()[0] is not None:
        hessian, counts = (part if part is None else part.cpu() for part in (hessian, counts))
        found = encode(weight.cpu(), bits, hessian, counts, damping)
        return Coded(found.codes.to(device), found.scale.to(device))
    goal = turned(weight.contiguous())
    counts = torch.ones(rows, device=weight.device) if counts is None else counts.float()
    quadratic = None if hessian is None else _quadratic(hessian, damping)
    scale = goal.square().mean(1, keepdim=True).sqrt_().half().float()
    codes = torch.zeros(rows, cols, dtype=torch.uint8, device=weight.device)
    choose(goal, scale, counts, codes, bits, quadratic, given=False)
    scale = _refit(goal, scale, codes, bits, quadratic)
    choose(goal, scale, counts, codes, bits, quadratic, given=True)
    scale = _refit(goal, scale, codes, bits, quadratic)
    return Coded(pack_bits(codes, bits), scale.half())


def _quadratic(hessian: Tensor, damping: float) -> Quadratic:
    """That of H [cols, cols] for turned weights, columns in their order."""
    matrix = turned(turned(hessian.float().contiguous()).T.contiguous())[None]
    factors = factor(matrix, damping)
    matrix.diagonal(dim1=-2, dim2=-1).add_(factors.damping)
    order = torch.arange(len(hessian), device=hessian.device)[None]
    return Quadratic(matrix, order, factors.feedback.mT.contiguous(), factors.pivots)


def _refit(
    goal: Tensor, scale: Tensor, codes: Tensor, bits: int, quadratic: Quadratic | None
) -> Tensor:
    """The best float16 scales for codes that stay, float32 [rows, 1]."""
    cols = goal.shape[1]
    basis = levels(pack_bits(codes, bits), None, bits, cols)
    if quadratic is not None:
        slopes = rounding.slope(goal - basis * scale, quadratic)
        return rounding.refit(scale, basis, slopes, quadratic, cols)
    best = (basis * goal).sum(1, keepdim=True) / basis.square().sum(1, keepdim=True)
    return torch.where(scale == 0, 0, best.clamp(min=0)).half().float()


def choose(
    goal: Tensor,
    scale: Tensor,
    counts: Tensor,
    codes: Tensor,
    bits: int,
    quadratic: Quadratic | None,
    given: bool,
) -> None:
    """Choose the codes of turned weights ``goal`` [rows, cols], in place.

    Without ``given`` codes every column follows what it was plus what makes up for the errors of
    those before it; with them, the best it can be while all others stay.

    Args:
        goal: Float32.
        scale: Float32 [rows, 1].
        counts: What an error in a row costs [rows].
        codes: uint8 [rows, cols].
        bits: b.
        quadratic: What errors cost; None for their squares.
        given: Whether there are codes already.
    """
    feedback = None if quadratic is None else quadratic.back[0]
    matrix = None if quadratic is None else quadratic.matrix[0]
    values = torch.tensor(table(bits), dtype=torch.float32, device=goal.device)
    if quadratic is None and given:  # nothing to make up for: once more with the new scales
        given = False
    if goal.device.type == "cpu":
        loaded, reason = native_trellis.LIBRARY.find()
        if loaded is not None:
            flat = scale.reshape(-1).contiguous()
            native_trellis.walk(
                loaded,
                goal,
                flat,
                counts.contiguous(),
                values,
                codes,
                bits,
                TILE,
                start(bits),
                feedback,
                matrix,
                int(given),
                given,
            )
            return
        warn(reason)
    for first in range(0, len(goal), TILE):
        rows = slice(first, first + TILE)
        _choose(goal[rows], scale[rows], counts[rows], codes[rows], bits, feedback, matrix, given)


def _choose(
    goal: Tensor,
    scale: Tensor,
    counts: Tensor,
    codes: Tensor,
    bits: int,
    feedback: Tensor | None,
    matrix: Tensor | None,
    given: bool,
) -> None:
    """The same for the rows of one tile, with torch."""
    cols = goal.shape[1]
    error = torch.zeros_like(goal)
    if given:
        error = goal - levels(pack_bits(codes, bits), None, bits, cols) * scale
    inverse = torch.where(scale == 0, 0, 1 / scale)
    weights = counts[:, None] * scale.square()
    weights = (weights / weights.mean().clamp(min=1e-30)).clamp_(min=LEAST)
    weights[scale == 0] = 0
    step = COLUMNS if feedback is None else 1
    for k in range(0, cols, step):
        some = slice(k, min(k + step, cols))
        target = goal[:, some]
        if given and matrix is not None:
            target = target - error[:, some] + error @ matrix[:, some] / matrix[k, k]
        elif feedback is not None:
            target = target + error[:, :k] @ feedback[some, :k].T
        codes[:, some], found = walks(target * inverse, weights, bits)
        error[:, some] = goal[:, some] - found * scale


def walks(target: Tensor, weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The walks through the trellis nearest to columns, by the algorithm of Viterbi.

    Args:
        target: [rows, n], in units of the scales.
        weights: What a squared error in a row costs [rows, 1].
        bits: b.

    Returns:
        Codes, uint8, and values, float32, both [rows, n].
    """
    rows, count = target.shape
    values = torch.tensor(table(bits), dtype=torch.float32, device=target.device)
    prefixes = len(values) >> bits
    cost = torch.full((count, len(values)), 1e30, device=target.device)
    cost[:, start(bits)] = 0
    back = torch.empty(rows, count, prefixes, dtype=torch.uint8, device=target.device)
    for row in range(rows):
        best, source = cost.view(count, -1, prefixes).min(1)
        back[row] = source.to(torch.uint8)
        best = best - best.amin(1, keepdim=True)
        squares = (target[row, :, None] - values).square_() * weights[row]
        cost = best.repeat_interleave(2**bits, 1).add_(squares)
    state = cost.argmin(1)
    codes = torch.empty(rows, count, dtype=torch.uint8, device=target.device)
    found = torch.empty(rows, count, device=target.device)
    for row in reversed(range(rows)):
        codes[row], found[row] = (state & (2**bits - 1)).to(torch.uint8), values[state]
        prefix = state >> bits
        state = back[row].gather(1, prefix[:, None])[:, 0].long() * prefixes + prefix
    return codes, found

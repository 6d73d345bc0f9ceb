"""Rounding under a quadratic ``tr(E H E^T)``: sweeps with feedback, scales, single codes.

Compiled loops do the work on a CPU with a C++ compiler (``rounding.cpp``), torch elsewhere; both
give the same up to the last bits of sums.  Rows are independent of each other: rows [rows, cols] of
a quadratic with several parts are as many equal blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import native_rounding
from .feedback import Quadratic
from .format import Format
from .group_fit import REFINEMENTS, fit_group
from .refit import equations, improve
from .sweep import Cells, Lattice, Levels, Sweep

BLOCK = 64  # columns between two products with all errors so far


def sweep(
    weight: Tensor,
    fmt: Format,
    quadratic: Quadratic,
    lattice: Lattice,
    ratios: Sequence[float] | None = None,
) -> Tensor:
    """Codes, uint8 [rows, cols], of columns rounded so that each makes up for those before it.

    Args:
        weight: [rows, cols], float32.
        fmt: The format.
        quadratic: What errors cost.
        lattice: What codes stand for.
        ratios: If given, grids of an integer format are fitted, group by group, just before its
            columns are rounded, and the lattice's scales and zero points overwritten: clipping at
            these ratios, with squared errors weighted by what remains of them after feedback.
    """
    loaded = native_rounding.library(weight)
    if loaded is not None:
        search = None if ratios is None else (ratios, REFINEMENTS)
        return native_rounding.sweep(loaded, weight, quadratic, lattice, search, fmt.symmetric)
    parts, cols = quadratic.order.shape
    blocks = weight.view(parts, -1, cols)
    at = quadratic.order[:, None, :].expand(blocks.shape)
    points = lattice.levels if lattice.pairs else None
    levels = None if lattice.pairs else Levels.of(lattice.levels)
    columns = Sweep(blocks.gather(2, at), quadratic.back.mT, lattice.bits, levels, points)
    cells = _Cells(lattice, quadratic.order, blocks.shape[1])
    for start in range(0, cols, BLOCK if ratios is None else lattice.size):
        end = min(start + (BLOCK if ratios is None else lattice.size), cols)
        target = columns.target(start, end)
        if ratios is not None:
            pivots = quadratic.pivots[:, None, start:end].expand(-1, blocks.shape[1], -1)
            expected = columns.expected(target, start).mT.reshape(-1, end - start)
            middle = fmt.zero_point if fmt.symmetric else None
            fitted = fit_group(
                expected.contiguous(),
                pivots.reshape(expected.shape),
                ratios,
                2**fmt.bits - 1,
                middle,
            )
            cells.fill(start, *fitted)
        if lattice.pairs:
            columns.round_pairs(target, start, cells, quadratic.pivots[:, start:end])
            continue
        columns.round(target, start, cells)
    codes = columns.code.mT
    return torch.empty_like(codes).scatter_(2, at, codes).reshape(-1, cols)


class _Cells:
    """Scale, zero point and offset of the k-th column in order, in all rows."""

    def __init__(self, lattice: Lattice, order: Tensor, rows: int) -> None:
        self.lattice, self.rows = lattice, rows
        self.groups = order // lattice.size

    def fill(self, column: int, scale: Tensor, zero: Tensor) -> None:
        """Change scales and zero points [rows of all parts] of the group that has a column."""
        at = self._at(column)
        for part, values in ((self.lattice.scale, scale), (self.lattice.zero, zero)):
            part.view(*at.shape[:2], -1).scatter_(2, at, values.view(at.shape))

    def _at(self, column: int) -> Tensor:
        return self.groups[:, column, None, None].expand(-1, self.rows, 1)

    def __call__(self, column: int) -> Cells:
        at = self._at(column)
        parts = [
            None if p is None else p.view(*at.shape[:2], -1).gather(2, at)[..., 0]
            for p in self.lattice[:3]
        ]
        scale, zero, offset = parts
        assert scale is not None and zero is not None
        return Cells.of(scale, zero, offset)


def slope(error: Tensor, quadratic: Quadratic) -> Tensor:
    """E H [rows, cols] of errors E = W - Q: half of how fast the cost falls as Q rises."""
    loaded = native_rounding.library(error)
    if loaded is not None:
        return native_rounding.slope(loaded, error, quadratic)
    blocks = error.view(len(quadratic.matrix), -1, error.shape[1])
    return (blocks @ quadratic.matrix).view(error.shape)


def refit(scale: Tensor, basis: Tensor, slopes: Tensor, quadratic: Quadratic, size: int) -> Tensor:
    """The best scales for codes that stay, all those of a row together, where they lower its cost.

    Args:
        scale: The present scales, float32 [rows, spans].
        basis: What they multiply [rows, cols].
        slopes: The present :func:`slope` [rows, cols].
        quadratic: What errors cost.
        size: Columns of a span.

    Returns:
        The scales, float32 [rows, spans] but exact in float16, none with another sign.
    """
    spans = scale.shape[1]
    right = _summed(basis * slopes, spans, size)
    loaded = native_rounding.library(basis)
    if loaded is not None:
        left = native_rounding.normal(loaded, basis, quadratic, spans, size).movedim(0, 2)
    else:
        parts = zip(basis.chunk(len(quadratic.matrix)), quadratic.matrix, strict=True)
        left = torch.cat([equations(b.T.contiguous(), h, size) for b, h in parts], 2)
    return improve(scale, left, right.T).float()


def descend(
    codes: Tensor, slopes: Tensor, quadratic: Quadratic, lattice: Lattice, sweeps: int
) -> None:
    """Move every code to the best value while all others stay, column by column, again and again.

    No step raises the cost.

    Args:
        codes: uint8 [rows, cols], changed in place.
        slopes: Their :func:`slope` [rows, cols], changed likewise.
        quadratic: What errors cost.
        lattice: What codes stand for.
        sweeps: How often all columns have their turn.

    References:
        Behdin et al. (2023), "QuantEase: optimization-based quantization for language models".
    """
    loaded = native_rounding.library(slopes)
    if loaded is not None:
        native_rounding.descend(loaded, codes, slopes, quadratic, lattice, sweeps)
        return
    parts, cols = quadratic.order.shape
    blocks, falling = codes.view(parts, -1, cols), slopes.view(parts, -1, cols)
    if lattice.pairs:
        for column in list(range(0, cols, 2)) * sweeps:
            _descend_pair(blocks, falling, quadratic.matrix, lattice, column)
        return
    levels = Levels.of(lattice.levels)
    natural = torch.arange(cols, device=codes.device).expand(parts, -1)
    cells = _Cells(lattice._replace(offset=None), natural, blocks.shape[1])
    diagonal = quadratic.matrix.diagonal(dim1=1, dim2=2)
    for column in list(range(cols)) * sweeps:
        cell = cells(column)
        before = blocks[:, :, column]
        move = falling[:, :, column] / diagonal[:, column, None] * cell.inverse
        if levels is None:
            code = (before + move).round_().clamp_(0, 2**lattice.bits - 1)
            change = (code - before) * cell.scale
        else:
            assert lattice.levels is not None
            level = lattice.levels[before.long()]
            rank = torch.bucketize(level + move, levels.borders, right=True)
            change = (levels.values[rank] - level) * cell.scale
            code = torch.where(change == 0, before, levels.codes[rank])
        falling -= change[..., None] * quadratic.matrix[:, None, column]
        blocks[:, :, column] = code.to(torch.uint8)


def _descend_pair(
    codes: Tensor, slopes: Tensor, matrix: Tensor, lattice: Lattice, column: int
) -> None:
    """Move the codes [parts, rows, cols] of two columns, or of a last one, to the best points."""
    alone, points = column + 1 == codes.shape[2], lattice.levels
    assert points is not None
    both = slice(column, column + (1 if alone else 2))
    scale = lattice.scale[:, column // lattice.size].view(codes.shape[:2])[..., None, None]
    now = codes[:, :, column].long()
    if alone:
        points = points[: 2**lattice.bits, :1]
    else:
        now = now + (codes[:, :, column + 1].long() << lattice.bits)
    moves = (points - points[now][:, :, None]) * scale  # [parts, rows, points, columns]
    costs = (moves @ matrix[:, None, both, both] * moves).sum(-1)
    costs -= 2 * (moves * slopes[:, :, None, both]).sum(-1)
    least, best = costs.min(-1)
    best = torch.where(least < 0, best, now)
    change = moves.gather(2, best[..., None, None].expand(-1, -1, 1, moves.shape[3]))[:, :, 0]
    slopes -= change @ matrix[:, both]
    codes[:, :, column] = best & (2**lattice.bits - 1)
    if not alone:
        codes[:, :, column + 1] = best >> lattice.bits


def _summed(values: Tensor, spans: int, size: int) -> Tensor:
    """Sums [rows, spans] over spans of ``size`` columns of ``values`` [rows, cols]."""
    padded = pad(values, (0, spans * size - values.shape[1]))
    return padded.view(len(values), spans, size).sum(2)

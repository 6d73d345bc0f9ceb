"""Better scales for given codes of block formats: those of blocks, and of the groups in them.

Scales of groups are integers, so a row's are found by descent: group by group the best integers
while all else stays, then the scales of the block by least squares, block after block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Layout, block_line, layouts
from .format import Format
from .lines import Grid, exponent
from .refit import SURE, equation_chunks, improve, normal_equations, widen

SWEEPS = 2
SPAN = 256  # columns at a time


def refit_blocks(
    weight: Tensor, fmt: Format, grid: Grid, codes: Tensor, hessian: Tensor
) -> Grid:
    """The grid with which the codes of a block format cost least; see ``Family.refit``.

    Every row is one of the block format's: float16 scales (and minimums) of blocks, and integers
    of groups within their ranges.
    """
    layout = layouts()[fmt.name]
    kinds = 2 if "m" in layout.fields else 1
    nested = layout.scale_range is not None or "e" in layout.fields
    unknowns = kinds * (SPAN // fmt.group_size if nested else fmt.groups(weight.shape[1]))
    found = []
    for rows in equation_chunks(weight.shape, unknowns):
        part = grid.rows(rows)
        line = block_line(fmt, part)
        scaled = codes[rows]
        levels = scaled - line.zero if line.levels is None else line.levels[scaled.long()]
        bases = [levels, torch.ones_like(levels[:1])][:kinds]
        scales = [line.scale] if line.offset is None else [line.scale, line.offset]
        error = weight[rows].float().clone()
        for basis, scale in zip(bases, scales, strict=True):
            error -= basis * widen(scale, fmt.group_size, error.shape[1])
        gradient = error @ hessian
        if nested:
            state = _Exponents(part) if "e" in layout.fields else _Integers(part, layout)
            _descend(state, gradient, bases, hessian, fmt.group_size)
            found.append(state.grid())
        else:
            equations = normal_equations(gradient, bases, hessian, fmt.group_size)
            joint = improve(torch.cat(scales, 1), *equations).chunk(kinds, 1)
            found.append(Grid(joint[0], joint[1] if kinds == 2 else None))
    columns = zip(*found, strict=True)
    scale, *rest = (None if c[0] is None else torch.cat(c) for c in columns)  # type: ignore[arg-type]
    assert scale is not None
    return Grid(scale, *rest)


class _State(ABC):
    """The scales of some rows, in the form that a format stores."""

    @abstractmethod
    def step(self, start: int, left: Tensor, right: Tensor) -> Tensor:
        """Better the scales of the groups from ``start`` on, of one block if blocks are large.

        Args:
            start: The first group.
            left: A of the changes of their scales, and offsets; see ``normal_equations``.
            right: b, likewise.

        Returns:
            The changes [rows, unknowns].
        """

    @abstractmethod
    def grid(self) -> Grid:
        """As they are now."""


def _descend(
    state: _State, gradient: Tensor, bases: Sequence[Tensor], hessian: Tensor, size: int
) -> None:
    """Better the scales, block after block; ``gradient`` E H [rows, cols] is used up."""
    cols = gradient.shape[1]
    for sweep in range(SWEEPS):
        for start in range(0, cols, SPAN):
            here = slice(start, min(start + SPAN, cols))
            some = [basis[:, here] for basis in bases]
            equations = normal_equations(gradient[:, here], some, hessian[here, here], size)
            changes = state.step(start // size, *equations).chunk(len(bases), 1)
            moved = torch.zeros_like(gradient[:, here])
            for basis, change in zip(some, changes, strict=True):
                moved += basis * widen(change, size, moved.shape[1])
            ahead = slice(here.stop if sweep == SWEEPS - 1 else 0, cols)
            gradient[:, ahead].addmm_(moved, hessian[here, ahead], alpha=-1)


class _Exponents(_State):
    """Scales that are powers of two."""

    def __init__(self, grid: Grid) -> None:
        self.stored = grid.scale.clone()

    def step(self, start: int, left: Tensor, right: Tensor) -> Tensor:
        """Half or twice a scale, group after group."""
        changes = torch.zeros_like(right)
        for group in range(right.shape[1]):
            old = self.stored[:, start + group].int()
            tried = torch.stack([old, (old - 1).clamp(min=2), (old + 1).clamp(max=254)])
            moves = exponent(tried) - exponent(old)
            slope, curve = right[:, group], left[:, group, group]
            costs = moves * (curve * moves - 2 * slope) + SURE * (slope * moves).abs()
            self.stored[:, start + group] = _cheapest(costs, tried, old).to(torch.uint8)
            changes[:, group] = move = _cheapest(costs, moves, torch.zeros_like(slope))
            right = right - left[:, group] * move[:, None]
        return changes

    def grid(self) -> Grid:
        """See :class:`_State`."""
        return Grid(self.stored, None)


class _Integers(_State):
    """Scales, and minimums, of groups that are integers times those of their block."""

    def __init__(self, grid: Grid, layout: Layout) -> None:
        assert layout.scale_range is not None and grid.scales is not None
        (self.low, self.high), self.bias = layout.scale_range, layout.bias
        of_block = [grid.scale] if grid.zero is None else [grid.scale, grid.zero]
        self.of_block = torch.stack(of_block, 2).float()  # [rows, blocks, kinds]
        self.scales = grid.scales.float() - self.bias
        self.mins = None if grid.mins is None else grid.mins.float()

    def step(self, start: int, left: Tensor, right: Tensor) -> Tensor:
        """The best integers of every group, then the scales of the block."""
        block = start * self.of_block.shape[1] // self.scales.shape[1]
        scale = self.of_block[:, block]
        kinds = scale.shape[1]
        count = right.shape[1] // kinds
        changes = torch.zeros_like(right)
        for group in range(count):
            unknowns = [group + kind * count for kind in range(kinds)]
            some = left[:, unknowns]
            moves = self._integers(start + group, scale, some[:, :, unknowns], right[:, unknowns])
            changes[:, unknowns] = moves
            right = right - (moves[:, None] @ some)[:, 0]
        basis = right.new_zeros(len(right), kinds, kinds * count)
        here = slice(start, start + count)
        basis[:, 0, :count] = self.scales[:, here]
        if self.mins is not None:
            basis[:, 1, count:] = -self.mins[:, here]
        of_block = basis @ left @ basis.mT, (basis @ right[..., None])[..., 0]
        self.of_block[:, block] = improve(scale, *of_block).float()
        return changes + ((self.of_block[:, block] - scale)[:, None] @ basis)[:, 0]

    def _integers(self, group: int, scale: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The best scale of a group with its minimum as it is, one less and one more.

        Args:
            group: Which.
            scale: The block's scale, and the scale of its minimums: [rows, kinds].
            left: A of the changes of the group's own scale, and offset: [rows, kinds, kinds].
            right: b, likewise.

        Returns:
            The changes [rows, kinds].
        """
        old = self.scales[:, group]
        moves = torch.zeros(1 if self.mins is None else 3, *scale.shape, device=scale.device)
        if self.mins is not None:
            steps = torch.tensor([0.0, -1.0, 1.0], device=scale.device)[:, None]
            mins = (self.mins[:, group] + steps).clamp_(0, self.high)
            moves[..., 1] = -scale[:, 1] * (mins - self.mins[:, group])
        slope, curve = right[:, 0] - left[:, 0, -1] * moves[..., -1], left[:, 0, 0] * scale[:, 0]
        scales = (old + torch.where(curve != 0, slope / curve, 0)).round_()
        scales = scales.clamp_(self.low, self.high)
        moves[..., 0] = scale[:, 0] * (scales - old)
        linear = moves * right
        costs = (moves[..., :, None] * moves[..., None, :] * left).sum((-2, -1))
        costs += (SURE * linear.abs() - 2 * linear).sum(-1)
        self.scales[:, group] = _cheapest(costs, scales, old)
        if self.mins is not None:
            self.mins[:, group] = _cheapest(costs, mins, self.mins[:, group])
        return torch.stack([_cheapest(costs, move, torch.zeros_like(old)) for move in moves.unbind(-1)], 1)

    def grid(self) -> Grid:
        """See :class:`_State`."""
        scale, *zero = self.of_block.half().unbind(2)
        stored = (self.scales + self.bias).to(torch.uint8)
        if self.mins is None:
            return Grid(scale.contiguous(), None, stored)
        return Grid(scale.contiguous(), zero[0].contiguous(), stored, self.mins.to(torch.uint8))


def _cheapest(costs: Tensor, options: Tensor, old: Tensor) -> Tensor:
    """The option [options, rows] that costs least, where that is less than nothing: [rows]."""
    cost, best = costs.min(0)
    return torch.where(cost < 0, options.gather(0, best[None])[0], old)

"""Better scales for given codes of block formats: those of blocks, and of the groups in them.

Scales of groups are integers, so a row's are found by descent: group by group the best integers
while all else stays, then the scales of the block by least squares, block after block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .blocks import Layout, block_line, layouts
from .format import Format
from .lines import Grid, exponent
from .refit import SURE, equation_chunks, equations, improve, right_sides, widen

SWEEPS = 2
SPAN = 256  # columns at a time: a large block, or several small ones


def refit_blocks(weight: Tensor, fmt: Format, grid: Grid, codes: Tensor, hessian: Tensor) -> Grid:
    """The grid of a block format with which given codes cost less; see ``Family.refit``."""
    layout, size = layouts()[fmt.name], fmt.group_size
    affine = "m" in layout.fields
    descends = layout.scale_range is not None or "e" in layout.fields
    unknowns = (1 + affine) * (SPAN // size if descends else fmt.groups(weight.shape[1]))
    found = []
    for rows in equation_chunks(weight.shape, unknowns):
        part = grid.rows(rows)
        line = block_line(fmt, part)
        levels = codes[rows].T.contiguous()
        levels = levels - line.zero if line.levels is None else line.levels[levels.int()]
        error = weight[rows].T - levels * widen(line.scale.T, size, len(levels))
        if line.offset is not None:
            error -= widen(line.offset.T, size, len(levels))
        gradient = hessian @ error
        if descends:
            state = _Exponents(part) if "e" in layout.fields else _Integers(part, layout)
            _descend(state, gradient, levels, hessian, size, affine)
            found.append(state.grid())
        else:  # all float16, so all at once
            left = equations(levels, hessian, size, affine)
            right = right_sides(gradient, levels, size, affine)
            old = part.scale if part.zero is None else torch.cat([part.scale, part.zero], 1)
            new = improve(old, left, right).chunk(1 + affine, 1)
            found.append(Grid(new[0].contiguous(), new[1].contiguous() if affine else None))
    joined = [
        None if column[0] is None else torch.cat([part for part in column if part is not None])
        for column in zip(*found, strict=True)
    ]
    assert joined[0] is not None
    return Grid(joined[0], *joined[1:])


class _State(ABC):
    """The scales of some rows, in the form that a format stores, transposed: [groups, rows]."""

    @abstractmethod
    def step(self, start: int, left: Tensor, right: Tensor) -> Tensor:
        """Better the scales of groups that share a block, or some blocks.

        Args:
            start: The first group.
            left: The A of their scales and offsets [unknowns, unknowns, rows], see ``equations``.
            right: The b [unknowns, rows]; used up.

        Returns:
            The changes of scales and offsets [unknowns, rows].
        """

    @abstractmethod
    def grid(self) -> Grid:
        """As they are now."""


def _descend(
    state: _State, gradient: Tensor, levels: Tensor, hessian: Tensor, size: int, affine: bool
) -> None:
    """Better the scales block after block; ``gradient`` H E^T [cols, rows] is used up."""
    cols = len(levels)
    spans = [slice(start, min(start + SPAN, cols)) for start in range(0, cols, SPAN)]
    lefts = [equations(levels[here], hessian[here, here], size, affine) for here in spans]
    for last in (*[False] * (SWEEPS - 1), True):
        for here, left in zip(spans, lefts, strict=True):
            right = right_sides(gradient[here], levels[here], size, affine)
            scales, *offsets = state.step(here.start // size, left, right).chunk(1 + affine)
            change = widen(scales, size, here.stop - here.start).mul_(levels[here])
            for part in offsets:
                change += widen(part, size, len(change))
            ahead = slice(here.stop if last else 0, cols)
            gradient[ahead].addmm_(hessian[ahead, here], change, alpha=-1)


class _Exponents(_State):
    """Scales that are powers of two."""

    def __init__(self, grid: Grid) -> None:
        self.stored = grid.scale.T.int().contiguous()

    def step(self, start: int, left: Tensor, right: Tensor) -> Tensor:
        """Half or twice a scale, group after group."""
        changes = torch.zeros_like(right)
        for group in range(len(right)):
            old, slope = self.stored[start + group], right[group]
            tried = torch.stack([(old - 1).clamp(min=2), (old + 1).clamp(max=254)])
            moves = exponent(tried) - exponent(old)
            costs = moves * (left[group, group] * moves - 2 * slope) + SURE * (slope * moves).abs()
            self.stored[start + group] = _cheapest(costs, tried, old)
            changes[group] = _cheapest(costs, moves, torch.zeros_like(slope))
            right.addcmul_(left[group], changes[group], value=-1)
        return changes

    def grid(self) -> Grid:
        """See :class:`_State`."""
        return Grid(self.stored.T.to(torch.uint8).contiguous(), None)


class _Integers(_State):
    """Scales, and minimums, of groups: integers times the scales of their block."""

    def __init__(self, grid: Grid, layout: Layout) -> None:
        assert layout.scale_range is not None and grid.scales is not None
        (self.low, self.high), self.bias = layout.scale_range, layout.bias
        of_block = [grid.scale] if grid.zero is None else [grid.scale, grid.zero]
        self.of_block = torch.stack([part.T.float() for part in of_block])  # [kinds, blocks, rows]
        self.scales = grid.scales.T.float().sub_(self.bias).contiguous()
        self.mins = None if grid.mins is None else grid.mins.T.float().contiguous()

    def step(self, start: int, left: Tensor, right: Tensor) -> Tensor:
        """The best integers of every group, then the scales of the block."""
        kinds, blocks, _ = self.of_block.shape
        block, count = start * blocks // len(self.scales), len(right) // kinds
        scale, changes = self.of_block[:, block], torch.zeros_like(right)
        for group in range(count):
            own = slice(group, None, count)  # the unknowns of this group
            self._integers(start + group, scale, left[own, own], right[own], changes[own])
            for unknown in range(group, len(right), count):
                right.addcmul_(left[unknown], changes[unknown], value=-1)
        basis = self.scales[None, start : start + count]
        if self.mins is not None:
            basis = torch.cat([basis, -self.mins[None, start : start + count]])
        shape = kinds, count, kinds, count, -1
        left = torch.einsum("iajbr,iar,jbr->ijr", left.view(shape), basis, basis)
        right = (right.view(basis.shape) * basis).sum(1)
        better = improve(scale.T, left, right).float().T
        changes.view(basis.shape).addcmul_(basis, (better - scale)[:, None])
        self.of_block[:, block] = better
        return changes

    def _integers(
        self, group: int, scale: Tensor, left: Tensor, right: Tensor, changes: Tensor
    ) -> None:
        """The best scale of a group with its minimum as it is, one less and one more.

        Args:
            group: Which.
            scale: The block's scale, and the scale of its minimums [kinds, rows].
            left: The A of the group's scale, and offset [kinds, kinds, rows].
            right: The b, likewise [kinds, rows].
            changes: Receives their changes [kinds, rows].
        """
        old, slope, curve = self.scales[group], right[0], left[0, 0]
        mins = shifts = mixed = fixed = torch.zeros_like(old)[None]
        if self.mins is not None:
            least = self.mins[group]
            mins = torch.stack([least, least - 1, least + 1]).clamp_(0, self.high)
            shifts = (mins - least).mul_(-scale[1])
            mixed, linear = left[0, 1] * shifts, right[1] * shifts
            fixed = left[1, 1] * shifts * shifts - 2 * linear + SURE * linear.abs()
        step = scale[0] * curve
        scales = old + torch.where(step != 0, (slope - mixed) / step, 0)
        scales = scales.round_().clamp_(self.low, self.high)
        moves = (scales - old).mul_(scale[0])
        costs = moves * (curve * moves + 2 * mixed - 2 * slope) + SURE * (slope * moves).abs()
        costs += fixed
        nothing = torch.zeros_like(old)
        changes[0] = _cheapest(costs, moves, nothing)
        self.scales[group] = _cheapest(costs, scales, old)
        if self.mins is not None:
            changes[1] = _cheapest(costs, shifts, nothing)
            self.mins[group] = _cheapest(costs, mins, self.mins[group])

    def grid(self) -> Grid:
        """See :class:`_State`."""
        scale, *zero = (part.T.half().contiguous() for part in self.of_block)
        stored = (self.scales + self.bias).T.to(torch.uint8).contiguous()
        if self.mins is None:
            return Grid(scale, None, stored)
        return Grid(scale, zero[0], stored, self.mins.T.to(torch.uint8).contiguous())


def _cheapest(costs: Tensor, options: Tensor, old: Tensor) -> Tensor:
    """The option [options, rows] that costs least, where that is less than nothing: [rows]."""
    cost, best = costs.min(0)
    return torch.where(cost < 0, options.gather(0, best[None])[0], old)

"""Scales of packed weights: what they are, others for the same codes, and slopes in them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .format import MAX_FLOAT16, family_of
from .grid import line_of
from .lines import Grid, grouped
from .packed import PackedTensor

FIELDS = ("scale", "zero")  # of a Grid; a zero that is a float16 scales minimums


def scales_of(packed: PackedTensor) -> dict[str, Tensor]:
    """The float16 scales of a packed weight, by field of its grid; empty if it has none.

    Of a block with scales of groups these are its own alone, since those of groups are integers.
    Zero points are no scales; the minimums of a block, or the scale of its minimums, are.

    >>> from bitplan.quantizers.format import Format
    >>> from bitplan.quantizers.methods import METHODS, Evidence
    >>> weight = torch.linspace(-1, 1, 512).view(2, 256)
    >>> for name in ("int3-g64-asym", "q4_k", "mxfp4", "bf16"):
    ...     packed = METHODS.get("rtn")(weight, Format.parse(name), Evidence())
    ...     print(name, {field: list(part.shape) for field, part in scales_of(packed).items()})
    int3-g64-asym {'scale': [2, 4]}
    q4_k {'scale': [2, 1], 'zero': [2, 1]}
    mxfp4 {}
    bf16 {}
    """
    grid = packed.grid()
    return {} if grid is None else float_fields(grid)


def float_fields(grid: Grid) -> dict[str, Tensor]:
    """The fields of a grid that are float16."""
    found = {field: getattr(grid, field) for field in FIELDS}
    return {f: part for f, part in found.items() if part is not None and part.dtype == torch.half}


def with_fields(grid: Grid, scales: Mapping[str, Tensor]) -> Grid:
    """A grid with other scales, rounded to float16."""
    halves = {field: part.clamp(-MAX_FLOAT16, MAX_FLOAT16).half() for field, part in scales.items()}
    return grid._replace(**halves)


def rescaled(
    packed: PackedTensor, scales: Mapping[str, Tensor], grid: Grid | None = None
) -> PackedTensor:
    """The same codes and zero points, in as many bytes, with other scales.

    Args:
        packed: The weight.
        scales: What takes the place of :func:`scales_of`, rounded to float16.
        grid: That of ``packed``, if it is at hand.

    Raises:
        ValueError: If the weight has no such scale, or one of another shape.
    """
    grid = grid or packed.grid()
    known = {} if grid is None else float_fields(grid)
    for field, part in scales.items():
        if field not in known or known[field].shape != part.shape:
            there = {name: list(found.shape) for name, found in known.items()} or "none"
            raise ValueError(
                f"A {packed.fmt} weight {list(packed.shape)} has no {field!r} of the shape "
                f"{list(part.shape)}; the scales it has: {there}."
            )
    if grid is None or not scales:
        return packed
    parts = family_of(packed.fmt).rescale(packed.fmt, packed.tensors, with_fields(grid, scales))
    return PackedTensor(packed.fmt, packed.shape, parts)


def log_slopes(
    packed: PackedTensor, grid: Grid, gradient: Tensor, rows: slice | Tensor = slice(None)
) -> dict[str, Tensor]:
    """Slopes in the logarithms of the scales, from the gradient with respect to the weight.

    With a weight ``Q = s level(c) + o``, whose offset o is 0 or a multiple of the minimum m::

        dL / d log s = sum_j G_j (Q_j - o)        dL / d log m = sum_j G_j o

    over the weights j that share the scale, or the minimum.

    Args:
        packed: The weight; a low-rank correction is part of it, but of no scale.
        grid: Its grid.
        gradient: G [n, cols] of some rows.
        rows: Which ones.

    Returns:
        By field, as :func:`scales_of`: [n, groups], [n, blocks], or [1, 1] for a scale of the
        whole tensor, to be added up over the rows.
    """
    coded = packed.coded()
    fmt, some = coded.fmt, grid.rows(rows)
    line = line_of(fmt, some)
    weight = coded.dequantize(rows)
    groups = max(line.scale.shape[1], fmt.groups(packed.shape[1]))
    scale = weight.new_zeros(len(weight), groups)
    sums = torch.zeros_like(scale) if line.offset is not None else None
    for (g, where), (w, _) in zip(
        grouped(gradient, fmt.group_size), grouped(weight, fmt.group_size), strict=True
    ):
        scale[:, where] = (g * w).sum(2)
        if sums is not None:
            sums[:, where] = g.sum(2)
    slopes = {"scale": scale}
    if sums is not None and line.offset is not None:
        slopes["zero"] = line.offset * sums
        scale -= slopes["zero"]
    return {field: _shared(slopes[field], part.shape) for field, part in float_fields(some).items()}


def _shared(slopes: Tensor, shape: torch.Size) -> Tensor:
    """Slopes [rows, groups] added up over the groups that share one scale."""
    if shape[0] == 1 != len(slopes):
        return slopes.sum().view(1, 1)
    return slopes.view(len(slopes), shape[1], -1).sum(2)

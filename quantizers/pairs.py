"""Pairs of columns whose codes together stand for a point of the plane.

The codes c0 and c1 of two columns, b bits each, are the point ``c0 + 2^b c1``.  A last column
without a neighbour is the first coordinate of one of the first 2^b points.
"""

from __future__ import annotations

import torch
from torch import Tensor

REACH, CELLS = 4.0, 256  # of the squares in which points are looked up, on either side


def nearest_points(values: Tensor, points: Tensor, bits: int) -> Tensor:
    """Codes, float32 shaped like ``values`` [..., columns], of the points nearest to pairs.

    Args:
        values: In units of the scale; the first column is the first of a pair.
        points: Float32 [4^b, 2].
        bits: b.
    """
    codes = torch.empty_like(values)
    even = values.shape[-1] // 2 * 2
    if even:
        x, y = values[..., 0:even:2], values[..., 1:even:2]
        best = _best(x, y, points)
        codes[..., 0:even:2] = best & (2**bits - 1)
        codes[..., 1:even:2] = best >> bits
    if even < values.shape[-1]:
        codes[..., even] = _best(values[..., even], None, points[: 2**bits]).to(codes.dtype)
    return codes


def point_table(points: Tensor) -> Tensor:
    """The numbers, int32 [CELLS^2], of the points nearest to the middles of small squares."""
    axis = ((torch.arange(CELLS, device=points.device) + 0.5) / CELLS - 0.5) * 2 * REACH
    return _best(axis.repeat_interleave(CELLS), axis.repeat(CELLS), points)


def look_up_points(values: Tensor, points: Tensor, table: Tensor) -> Tensor:
    """The points about nearest to pairs of ``values`` [..., columns]; far fewer operations."""
    cells = values.mul(CELLS / (2 * REACH)).add_(CELLS / 2).clamp_(0, CELLS - 1).int()
    even = values.shape[-1] // 2 * 2
    found = torch.empty_like(values)
    at = table[cells[..., 0:even:2] * CELLS + cells[..., 1:even:2]]
    found[..., 0:even:2] = points[:, 0][at]
    found[..., 1:even:2] = points[:, 1][at]
    if even < values.shape[-1]:
        last = values[..., even]
        bits = (len(points).bit_length() - 1) // 2
        found[..., even] = points[:, 0][_best(last, None, points[: 2**bits])]
    return found


def _best(x: Tensor, y: Tensor | None, points: Tensor) -> Tensor:
    """Numbers, int32, of the nearest points, the first one of several."""
    best = torch.full(x.shape, -torch.inf, device=x.device)
    found = torch.zeros(x.shape, dtype=torch.int32, device=x.device)
    for i, (px, py) in enumerate(points.tolist()):
        if y is None:
            score = x * px - px * px / 2
        else:
            score = torch.add(x * px, y, alpha=py).sub_((px * px + py * py) / 2)
        better = score > best
        best = torch.where(better, score, best)
        found.masked_fill_(better, i)
    return found


def values_of(codes: Tensor, points: Tensor, bits: int) -> Tensor:
    """What codes [..., columns] stand for in units of the scale, float32 of that shape."""
    values = torch.empty(codes.shape, device=codes.device)
    even = codes.shape[-1] // 2 * 2
    at = codes[..., 0:even:2].long() + (codes[..., 1:even:2].long() << bits)
    values[..., 0:even:2] = points[:, 0][at]
    values[..., 1:even:2] = points[:, 1][at]
    if even < codes.shape[-1]:
        values[..., even] = points[:, 0][codes[..., even].long()]
    return values

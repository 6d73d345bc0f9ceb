"""Normal levels: 4, 8 or 16 levels with the least squared error on normal weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

from ..format import GROUPS, PER_TENSOR, Format
from . import FAMILIES
from ._codes import Codes

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Grid

_GROUPS = {text: size for text, size in GROUPS.items() if size != PER_TENSOR}
_NAME = re.compile(rf"nl([234])-g({'|'.join(_GROUPS)})")
_CLOSE = 1e-10


@cache
def levels(bits: int) -> tuple[float, ...]:
    """The 2^b levels of a standard normal variable with the least mean squared error, ascending.

    Every level is the mean of what is rounded to it, and borders lie half-way between levels: the
    two conditions in turn, from the quantiles on, until neither moves a level any more.

    >>> [round(level, 4) for level in levels(2)]
    [-1.5104, -0.4528, 0.4528, 1.5104]

    References:
        Max (1960), "Quantizing for minimum distortion", table I.
    """
    normal, count = NormalDist(), 2 ** (bits - 1)
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)]
    while True:
        borders = [0.0, *((low + high) / 2 for low, high in pairwise(upper))]
        density = [*map(normal.pdf, borders), 0.0]
        below = [*map(normal.cdf, borders), 1.0]
        moved = [(density[i] - density[i + 1]) / (below[i + 1] - below[i]) for i in range(count)]
        change = max(abs(new - old) for new, old in zip(moved, upper, strict=True))
        upper = moved
        if change < _CLOSE:
            return (*(-level for level in reversed(upper)), *upper)


@FAMILIES.register("normal_levels")
class NormalLevels(Codes):
    """Normal levels: codes of the best levels for normal weights, and a fitted scale per group.

    The weight is s * level[c], with a float16 scale s for every group of weights along a row, which
    is fitted, and about the group's root mean square. The bytes are those of symmetric integers.

    >>> import torch
    >>> from bitplan.quantizers.grid import render
    >>> from bitplan.quantizers.methods.rtn import fit_grid
    >>> weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    >>> for fmt in map(Format.parse, ("int3-g64", "int3-g64-asym", "nl3-g64")):
    ...     error = render(weight, fmt, fit_grid(weight, fmt)) - weight
    ...     print(fmt, f"{error.square().mean():.4f}")
    int3-g64 0.0327
    int3-g64-asym 0.0322
    nl3-g64 0.0310

    References:
        Max (1960), "Quantizing for minimum distortion"; Lloyd (1982), "Least squares quantization
        in PCM".
    """

    grammar = f"nl{{2|3|4}}-g{{{'|'.join(_GROUPS)}}}"
    examples = ("nl2-g64", "nl3-g64", "nl3-gc", "nl4-g32")

    def parse(self, text: str) -> Format | None:
        """See :class:`Family`."""
        if not (match := _NAME.fullmatch(text)):
            return None
        bits, group = int(match[1]), _GROUPS[match[2]]
        return Format(
            text,
            "normal_levels",
            bits,
            group,
            symmetric=True,
            layout="codes",
            levels=levels(bits),
        )

    def names(self) -> Iterable[str]:
        """All of them."""
        return [f"nl{bits}-g{group}" for bits in (2, 3, 4) for group in _GROUPS]

    def reach(self, fmt: Format, low: float, high: float) -> float:
        """The largest scale: of a group with one weight that is not 0."""
        return max(-low, high) / levels(fmt.bits)[len(levels(fmt.bits)) // 2]

    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Grid:
        """The best scale of every group, from its largest weight and its root mean square on."""
        from ..grid_fit import fit_normal_levels

        return fit_normal_levels(weight, fmt, importance)

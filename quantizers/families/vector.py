"""Vector codes: pairs of weights become one of 16 or 64 points of the plane."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..format import GROUPS, PER_TENSOR, Format
from . import FAMILIES
from ._codes import Codes

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Grid, Line

_GROUPS = {text: size for text, size in GROUPS.items() if size != PER_TENSOR}
_NAME = re.compile(rf"vq([23])-g({'|'.join(_GROUPS)})")
_UNIT = 512
_POINTS = {  # in that unit
    2: (
        (-979, -9),
        (-16, 9),
        (440, -135),
        (-467, 136),
        (877, 276),
        (-376, -322),
        (306, 348),
        (943, -360),
        (82, -439),
        (-148, 464),
        (-723, 663),
        (-782, -666),
        (486, -806),
        (550, 837),
        (-167, -938),
        (-87, 979),
    ),
    3: (
        (-776, -23),
        (390, -26),
        (-345, 30),
        (652, -32),
        (1045, -41),
        (-120, -53),
        (152, -68),
        (-1437, 68),
        (39, 114),
        (-530, -140),
        (-583, 172),
        (254, 182),
        (818, 198),
        (-999, 198),
        (-151, 208),
        (-1083, -214),
        (519, 236),
        (-283, -237),
        (-27, -262),
        (485, -263),
        (817, -271),
        (227, -282),
        (-361, 290),
        (1291, 316),
        (-781, -348),
        (1354, -350),
        (48, 366),
        (-754, 406),
        (-496, -416),
        (296, 431),
        (-212, -483),
        (68, -494),
        (856, 497),
        (-177, 499),
        (603, -504),
        (-471, 508),
        (537, 517),
        (332, -523),
        (945, -586),
        (106, 629),
        (-1171, 633),
        (-1220, -664),
        (-771, -682),
        (-426, -695),
        (-68, -726),
        (-743, 739),
        (350, 775),
        (-414, 780),
        (-115, 784),
        (250, -786),
        (585, -824),
        (672, 825),
        (1108, 886),
        (-307, -967),
        (126, 1019),
        (1003, -1030),
        (59, -1040),
        (-300, 1098),
        (-739, -1107),
        (-776, 1171),
        (537, 1233),
        (435, -1250),
        (-195, -1408),
        (-32, 1451),
    ),
}


def codebook(bits: int) -> tuple[tuple[float, float], ...]:
    """4^b points of the plane with nearly the least mean squared error on two normal variables.

    They are a fixed point of Lloyd's two conditions, from a sunflower that is as dense as good
    codebooks are: as the square root of the density.  Those nearest to the first axis come first:
    with the first 2^b a last weight without a neighbour is stored.

    >>> points = codebook(2)
    >>> len(points), [round(x, 2) for x, _ in points[:4]]
    (16, [-1.91, -0.03, 0.86, -0.91])

    References:
        Linde, Buzo and Gray (1980), "An algorithm for vector quantizer design".
    """
    return tuple((x / _UNIT, y / _UNIT) for x, y in _POINTS[bits])


@FAMILIES.register("vector")
class Vector(Codes):
    """Vector codes: two weights next to each other are one of 4^b points of a fixed codebook.

    A pair of weights is s * point[c0 + 2^b c1] with the b-bit codes c0 and c1 of the two and a
    float16 scale s for every group of weights along a row, fitted, about the group's root mean
    square.  The codebook is the best one for normal weights and computed, not stored, so that the
    bytes are those of symmetric integers.

    >>> import torch
    >>> from bitplan.quantizers.grid import render
    >>> from bitplan.quantizers.methods.rtn import fit_grid
    >>> weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    >>> for fmt in map(Format.parse, ("int2-g64", "nl2-g64", "vq2-g64")):
    ...     error = render(weight, fmt, fit_grid(weight, fmt)) - weight
    ...     print(fmt, f"{error.square().mean():.4f}")
    int2-g64 0.1287
    nl2-g64 0.1221
    vq2-g64 0.1064

    References:
        Linde, Buzo and Gray (1980), "An algorithm for vector quantizer design"; for weights:
        van Baalen et al. (2024), "GPTVQ: the blessing of dimensionality for LLM quantization".
    """

    grammar = f"vq{{2|3}}-g{{{'|'.join(_GROUPS)}}}"
    examples = ("vq2-g64", "vq2-gc", "vq3-g32")

    def parse(self, text: str) -> Format | None:
        """See :class:`Family`."""
        if not (match := _NAME.fullmatch(text)):
            return None
        group = _GROUPS[match[2]]
        return Format(text, "vector", int(match[1]), group, symmetric=True, vector=2)

    def names(self) -> Iterable[str]:
        """All of them."""
        return [f"vq{bits}-g{group}" for bits in (2, 3) for group in _GROUPS]

    def reach(self, fmt: Format, low: float, high: float) -> float:
        """The largest scale, about: of a group with one weight that is not 0."""
        return 2 * max(-low, high)

    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Grid:
        """The best scale of every group, from its largest weight and its root mean square on."""
        from ..grid_fit import fit_points

        return fit_points(weight, fmt, importance, codebook(fmt.bits))

    def line(self, fmt: Format, grid: Grid) -> Line:
        """Scale times the point of two codes."""
        import torch

        from ..lines import Line

        points = torch.tensor(codebook(fmt.bits), dtype=torch.float32, device=grid.scale.device)
        return Line(grid.scale.float(), torch.tensor(0.0), None, points)

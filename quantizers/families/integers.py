"""Integers with float16 scales, and zero points where the format is asymmetric."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..format import GROUPS, Format
from . import FAMILIES
from ._codes import Codes

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Grid

_NAME = re.compile(rf"int([1-8])-g({'|'.join(GROUPS)})(-asym)?")


@FAMILIES.register("integers")
class Integers(Codes):
    """Integers: b-bit codes, a float16 scale and, with -asym, a zero point per group.

    For every group of ``group_size`` weights along a row there is a scale s; the weight is
    s * (c - z).  An asymmetric format stores the integer zero point z of every group, a symmetric
    one has the implicit ``zero_point``.  Groups are 32, 64, 128 or 256 weights, a whole row (``c``)
    or the tensor (``t``).

    >>> import torch
    >>> from bitplan.quantizers.grid import render
    >>> from bitplan.quantizers.methods.rtn import fit_grid
    >>> weight, fmt = torch.tensor([[-0.4, 0.0, 0.1, 0.3]]), Format.parse("int3-gc-asym")
    >>> render(weight, fmt, fit_grid(weight, fmt))
    tensor([[-0.3999,  0.0000,  0.1000,  0.2999]])

    References:
        Jacob et al. (2018), "Quantization and training of neural networks for efficient
        integer-arithmetic-only inference": scale and zero point.
    """

    grammar = f"int{{1..8}}-g{{{'|'.join(GROUPS)}}}[-asym]"
    examples = ("int1-g32", "int2-g64-asym", "int3-gc", "int4-g64-asym", "int5-gt", "int8-g128")

    def parse(self, text: str) -> Format | None:
        """See :class:`Family`."""
        if not (match := _NAME.fullmatch(text)):
            return None
        bits, group, asymmetric = match.groups()
        return Format(
            text,
            "integers",
            int(bits),
            GROUPS[group],
            symmetric=asymmetric is None,
            layout="codes",
            integer=True,
        )

    def names(self) -> Iterable[str]:
        """All of them."""
        return [f"int{b}-g{g}{z}" for b in range(1, 9) for g in GROUPS for z in ("", "-asym")]

    def reach(self, fmt: Format, low: float, high: float) -> float:
        """The largest scale."""
        if fmt.symmetric:
            return max(-low, high) / fmt.zero_point
        return (high - low) / float(2**fmt.bits - 1)

    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Grid:
        """Clip search, see ``rtn``."""
        from ..grid_fit import fit_integers

        return fit_integers(weight, fmt, importance)

"""NormalFloat: 16 levels at quantiles of the normal distribution."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

from ..format import GROUPS, PER_TENSOR, Format
from . import FAMILIES
from ._codes import Codes

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Grid

BITS = 4
_GROUPS = {text: size for text, size in GROUPS.items() if size != PER_TENSOR}
_NAME = re.compile(rf"nf4-g({'|'.join(_GROUPS)})")


@cache
def levels(bits: int = BITS) -> tuple[float, ...]:
    """The 2^b levels from -1 to 1, 0 among them, ascending.

    Half of the codes are quantiles of a standard normal distribution below 0 and half, one more,
    above, evenly spaced in probability from 1/2 to 1 - d; the outermost is scaled to 1.  With
    d = (1/2^(b+1) + 1/(2^(b+1) - 2)) / 2, the mean of what either half alone would give, both
    halves end at the same distance from 0.

    >>> [round(level, 4) for level in levels()[:9]]
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.091, 0.0, 0.0796]

    References:
        Dettmers et al. (2023), "QLoRA: efficient finetuning of quantized LLMs", section 3 and
        appendix E; the offset d as in Dotzel et al. (2024), "Learning from students".
    """
    count = 2 ** (bits - 1)
    offset = (1 / (4 * count) + 1 / (4 * count - 2)) / 2
    quantile = NormalDist().inv_cdf
    below = [quantile(offset + i * (0.5 - offset) / (count - 1)) for i in range(count - 1)]
    above = [-quantile(offset + i * (0.5 - offset) / count) for i in reversed(range(count))]
    return tuple(value / -below[0] for value in (*below, 0.0, *above))


@FAMILIES.register("nf4")
class NormalFloat(Codes):
    """NormalFloat: 4-bit codes of levels that suit normal weights, the group's largest as scale.

    The weight is s * level[c], with a float16 scale s for every group of weights along a row.

    >>> import torch
    >>> from bitplan.quantizers.grid import render
    >>> from bitplan.quantizers.methods.rtn import fit_grid
    >>> weight, fmt = torch.tensor([[0.5, 0.1, 0.0, -0.16]]), Format.parse("nf4-g32")
    >>> render(weight, fmt, fit_grid(weight, fmt))
    tensor([[ 0.5000,  0.0805,  0.0000, -0.1422]])
    >>> 8 * fmt.stored_bytes((192, 576)) / (192 * 576)
    4.5

    References:
        Dettmers et al. (2023), "QLoRA: efficient finetuning of quantized LLMs", section 3.
    """

    grammar = f"nf4-g{{{'|'.join(_GROUPS)}}}"
    examples = ("nf4-g32", "nf4-g64", "nf4-gc")

    def parse(self, text: str) -> Format | None:
        """See :class:`Family`."""
        if not (match := _NAME.fullmatch(text)):
            return None
        return Format(
            text, "nf4", BITS, _GROUPS[match[1]], symmetric=True, layout="codes", levels=levels()
        )

    def names(self) -> Iterable[str]:
        """All of them."""
        return [f"nf4-g{group}" for group in _GROUPS]

    def reach(self, fmt: Format, low: float, high: float) -> float:
        """The scale is the largest weight."""
        return max(-low, high)

    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Grid:
        """The largest magnitude of every group; with importance, the best scale at or below it."""
        import torch

        from ..grid_fit import fit_levels
        from ..lines import Grid, grouped

        if importance is not None:
            return fit_levels(weight, fmt, importance)
        parts = [block.abs().amax(2) for block, _ in grouped(weight, fmt.group_size)]
        return Grid(torch.cat(parts, 1).half(), None)

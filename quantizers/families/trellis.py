"""Trellis codes: walks along the columns of weights whose directions were mixed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..format import PER_CHANNEL, Family, Format, Tensors
from . import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Grid
    from ..trellis import Coded

_NAME = re.compile(r"tcq([234])")
_DAMPING = 1e-3  # of importance that is known exactly


@FAMILIES.register("trellis")
class Trellis(Family["Coded"]):
    """Trellis codes: the last codes of a column together stand for a weight of the turned matrix.

    With b-bit codes c the turned weight of row i is s_i * value[state], the state the last 12 bits
    of the codes of its column, rows i, i - 1, ...; every 1024 rows begin anew.  The values are
    quantiles of the normal distribution and computed, as is the orthogonal matrix that turns the
    weight: signs and Hadamard transforms over the inputs.  What is stored are b bits a weight and a
    float16 scale s_i a row.

    >>> import torch
    >>> from bitplan.quantizers.grid import render
    >>> from bitplan.quantizers.methods.rtn import fit_grid
    >>> weight = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    >>> for fmt in map(Format.parse, ("nl2-gc", "vq2-gc", "tcq2")):
    ...     error = render(weight, fmt, fit_grid(weight, fmt)) - weight
    ...     print(fmt, f"{error.square().mean():.3f}")
    nl2-gc 0.116
    vq2-gc 0.100
    tcq2 0.067

    References:
        Tseng et al. (2024), "QTIP: quantization with trellises and incoherence processing".
    """

    grammar = "tcq{2|3|4}"
    examples = ("tcq2", "tcq3", "tcq4")

    def parse(self, text: str) -> Format | None:
        """See :class:`Family`."""
        if not (match := _NAME.fullmatch(text)):
            return None
        return Format(text, "trellis", int(match[1]), PER_CHANNEL, symmetric=True)

    def names(self) -> Iterable[str]:
        """All of them."""
        return self.examples

    def tensors(self, fmt: Format, shape: tuple[int, int]) -> Tensors:
        """``codes``, packed LSB-first as those of integers, and ``scale``."""
        rows, cols = shape
        return {
            "codes": ((rows, math.ceil(cols * fmt.bits / 8)), "uint8"),
            "scale": ((rows, 1), "float16"),
        }

    def reach(self, fmt: Format, low: float, high: float) -> float:
        """The largest scale, about: the root mean square of a row."""
        return 2 * max(-low, high)

    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Coded:
        """The nearest walks; of importance, what it is on average in columns and in rows."""
        import torch

        from ..trellis import encode

        weight = weight.detach().float()
        if importance is None or not importance.any():
            return encode(weight, fmt.bits, None, None, 0)
        entries = importance.float().expand(weight.shape)
        rows = entries.mean(1)
        hessian = torch.diag((entries / rows.mean()).mean(0))
        return encode(weight, fmt.bits, hessian, rows / rows.mean(), _DAMPING)

    def fit_under(
        self, weight: Tensor, fmt: Format, hessian: Tensor, rows: Tensor | None, damping: float
    ) -> Coded:
        """Columns of the turned weight in turn, each to make up for the errors before it."""
        from ..trellis import encode

        return encode(weight.float(), fmt.bits, hessian, rows, damping)

    def render(self, weight: Tensor, fmt: Format, fitted: Coded, out: Tensor) -> None:
        """What the codes stand for; the weight is not looked at."""
        from ..trellis import decode

        out.copy_(decode(fitted, fmt.bits, weight.shape[1]))

    def pack(self, weight: Tensor, fmt: Format, fitted: Coded) -> dict[str, Tensor]:
        """See :class:`Family`.

        Raises:
            ValueError: If only some of the rows are meant, which cannot be read without the others.
        """
        if fitted.which is not None:
            raise ValueError(
                f"Rows of a {fmt} weight depend on the rows before them and cannot be packed by "
                "themselves. Fit the format to these rows alone."
            )
        return {"codes": fitted.codes, "scale": fitted.scale}

    def grid(self, fmt: Format, tensors: Mapping[str, Tensor]) -> Grid | None:
        """None: no line has the codes."""
        return None

    def fitted(self, fmt: Format, tensors: Mapping[str, Tensor]) -> Coded:
        """See :class:`Family`."""
        from ..trellis import Coded

        return Coded(tensors["codes"], tensors["scale"])

    def decode(
        self, fmt: Format, cols: int, tensors: Mapping[str, Tensor], rows: slice | Tensor
    ) -> Tensor:
        """See :class:`Family`."""
        from ..trellis import decode

        fitted = self.fitted(fmt, tensors)
        every = isinstance(rows, slice) and rows == slice(None)
        return decode(fitted if every else fitted.rows(rows), fmt.bits, cols)

"""Low-rank corrections: codes, and two thin float16 matrices that give back what they lost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

from ..format import Family, Format, Tensors, family_of, fit
from . import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Grid

_NAME = re.compile(r"(.+)\+lr([1-9]\d{0,3})")
_MORE = 8  # columns of the sketch beyond the rank
_ITERATIONS = 4
LEAST = 1e-4  # importance of a row or column, as a share of the mean, that a correction tells apart


class Corrected(NamedTuple):
    """What is kept of a weight: the grid of its codes and its correction.

    Attributes:
        grid: Scales and zero points of the codes.
        left: L [rows, rank], float16.
        right: R [rank, cols], float16.
    """

    grid: Grid
    left: Tensor
    right: Tensor

    def rows(self, rows: slice | Tensor) -> Corrected:
        """The same for some rows of the weight."""
        return Corrected(self.grid.rows(rows), self.left[rows], self.right)


@FAMILIES.register("low_rank")
class LowRank(Family[Corrected]):
    """Low-rank correction: codes of another format plus L @ R, which adds their error up to rank r.

    The codes are those of the format before ``+lr``: the weight is rounded as if there was nothing
    else, and what that loses is cut to its largest r singular values.  ``left`` [rows, r] and
    ``right`` [r, cols] are float16; r is at most the rows and the columns of a matrix.

    >>> fmt = Format.parse("int3-g64+lr16")
    >>> fmt.base.name, fmt.rank, fmt.integer
    ('int3-g64', 16, False)
    >>> fmt.stored_bytes((192, 576)) - fmt.base.stored_bytes((192, 576)) == 2 * 16 * (192 + 576)
    True
    >>> import torch
    >>> from bitplan.quantizers.grid import render
    >>> from bitplan.quantizers.methods.rtn import fit_grid
    >>> weight = torch.tensor([[0.5, 0.3, -0.2, 0.1], [0.1, -0.4, 0.2, 0.3]])
    >>> for fmt in map(Format.parse, ("int2-gc", "int2-gc+lr1", "int2-gc+lr2")):
    ...     error = render(weight, fmt, fit_grid(weight, fmt)) - weight
    ...     print(f"{fmt}: {error.norm():.3f}")
    int2-gc: 0.183
    int2-gc+lr1: 0.087
    int2-gc+lr2: 0.000

    References:
        Zhang et al. (2024), "LQER: low-rank quantization error reconstruction for LLMs", whose
        scaling by activations takes importance; Halko, Martinsson and Tropp (2011), "Finding
        structure with randomness", algorithm 4.4, for the singular vectors.
    """

    grammar = "{int...|nf4...|nl...}+lr{rank}"
    examples = ("int2-g32+lr4", "int3-g64-asym+lr16", "int4-gc+lr8", "nf4-g64+lr2")

    def parse(self, text: str) -> Format | None:
        """See :class:`Family`."""
        if not (match := _NAME.fullmatch(text)):
            return None
        try:
            base = Format.parse(match[1])
        except ValueError:
            return None
        if base.layout != "codes" or base.rank:
            return None
        rank = int(match[2])
        return replace(
            base,
            name=f"{base.name}+lr{rank}",
            family="low_rank",
            integer=False,
            base=base,
            rank=rank,
        )

    def names(self) -> Iterable[str]:
        """Those of usual ranks."""
        bases = [f"int{b}-g{g}{z}" for b in (2, 3, 4) for g in (32, 64, 128) for z in ("", "-asym")]
        return [f"{base}+lr{rank}" for base in bases for rank in (8, 16, 32, 64)]

    def tensors(self, fmt: Format, shape: tuple[int, int]) -> Tensors:
        """Those of the codes, ``left`` and ``right``."""
        rows, cols = shape
        rank = min(fmt.rank, rows, cols)
        factors: Tensors = {
            "left": ((rows, rank), "float16"),
            "right": ((rank, cols), "float16"),
        }
        return _base(fmt).tensors(shape) | factors

    def reach(self, fmt: Format, low: float, high: float) -> float:
        """As without the correction, whose numbers are smaller."""
        return family_of(_base(fmt)).reach(_base(fmt), low, high)

    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Corrected:
        """Round, and correct the error, in important rows and columns first.

        For the correction a weight's importance is that of its row times that of its column, both
        means: the singular value decomposition of errors scaled so is the best one then.
        """
        import torch

        base = _base(fmt)
        grid = cast("Grid", fit(weight, base, importance))
        error = torch.empty_like(weight, dtype=torch.float32)
        family_of(base).render(weight, base, grid, error)
        torch.sub(weight, error, out=error)
        rank = min(fmt.rank, *weight.shape)
        if importance is None or not importance.any():
            return Corrected(grid, *factors(error, rank))
        entries = importance.float().reshape(-1, weight.shape[1])
        rows, columns = (
            (mean / mean.mean()).clamp_(min=LEAST).sqrt_()
            for mean in (entries.mean(1, keepdim=True), entries.mean(0))
        )
        left, right = factors(error.mul_(rows).mul_(columns), rank)
        return Corrected(grid, (left / rows).half(), (right / columns).half())

    def render(self, weight: Tensor, fmt: Format, fitted: Corrected, out: Tensor) -> None:
        """The nearest codes, decoded, plus L @ R."""
        family_of(_base(fmt)).render(weight, _base(fmt), fitted.grid, out)
        _add(out, fitted.left, fitted.right)

    def pack(self, weight: Tensor, fmt: Format, fitted: Corrected) -> dict[str, Tensor]:
        """See :class:`Family`."""
        codes = family_of(_base(fmt)).pack(weight, _base(fmt), fitted.grid)
        return codes | {"left": fitted.left, "right": fitted.right}

    def rescale(self, fmt: Format, tensors: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """Those of the codes; the correction stays."""
        parts = {name: part for name, part in tensors.items() if name not in ("left", "right")}
        return {**tensors, **family_of(_base(fmt)).rescale(_base(fmt), parts, grid)}

    def grid(self, fmt: Format, tensors: Mapping[str, Tensor]) -> Grid | None:
        """See :class:`Family`."""
        return family_of(_base(fmt)).grid(_base(fmt), tensors)

    def fitted(self, fmt: Format, tensors: Mapping[str, Tensor]) -> Corrected:
        """See :class:`Family`."""
        grid = self.grid(fmt, tensors)
        assert grid is not None
        return Corrected(grid, tensors["left"], tensors["right"])

    def decode(
        self, fmt: Format, cols: int, tensors: Mapping[str, Tensor], rows: slice | Tensor
    ) -> Tensor:
        """See :class:`Family`."""
        weight = family_of(_base(fmt)).decode(_base(fmt), cols, tensors, rows)
        _add(weight, tensors["left"][rows], tensors["right"])
        return weight


def _base(fmt: Format) -> Format:
    assert fmt.base is not None
    return fmt.base


def _add(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Add L @ R to a float32 weight [rows, cols] in place; no row depends on which others come.

    Products of float16 numbers are multiples of 2^-48, so float64 holds their sums exactly, in any
    order, as long as these stay below 32; a correction of weights does.
    """
    from ..lines import row_chunks

    right = right.double()
    for rows in row_chunks(weight.shape):
        weight[rows] = (weight[rows].double() + left[rows].double() @ right).float()


def factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L [rows, rank] and R [rank, cols], float16, whose product is nearest to ``error``.

    A randomized singular value decomposition, always from the same random numbers.
    """
    import torch

    rows, cols = error.shape
    count = min(rank + _MORE + rank // 2, rows, cols)
    generator = torch.Generator().manual_seed(0)
    sketch = error @ torch.randn(cols, count, generator=generator).to(error.device)
    basis = torch.linalg.qr(sketch).Q
    for _ in range(_ITERATIONS if count < min(rows, cols) else 0):
        basis = torch.linalg.qr(error.T @ basis).Q
        basis = torch.linalg.qr(error @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ error, full_matrices=False)
    share = values[:rank].sqrt()
    left = (basis @ left[:, :rank]) * share
    return left.half().contiguous(), (share[:, None] * right[:rank]).half().contiguous()

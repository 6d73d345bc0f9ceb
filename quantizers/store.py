"""Renderings: what every format really makes of every weight, one store per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .._base.threads import parallel_map
from .format import Fitted, Format
from .grid import grid_rows, render
from .methods import METHODS
from .packed import PackedTensor

Rows = slice | Tensor  # a range of rows, or their indices


class Renderings:
    """The renderings of named matrices: prices, measurements and files all take them from here.

    Only scales and zero points are cached, 3 bytes per weight group and format; codes are
    recomputed by rounding.

    Args:
        weight: Gives the original weight [rows, cols], float32, of a name.
        rounding: Name of the rounding method.
    """

    def __init__(self, weight: Callable[[str], Tensor], rounding: str = "rtn") -> None:
        self.weight = weight
        self._method = METHODS.get(rounding)
        self._grids: dict[tuple[str, str], Fitted | None] = {}

    def fit(
        self, names: Sequence[str], formats: Sequence[Format], advance: Callable[[], None]
    ) -> None:
        """Make the renderings of all matrices in all formats; ``advance`` is called per matrix."""

        def work(name: str) -> None:
            for fmt in formats:
                self.prepare(name, fmt)

        for _ in parallel_map(work, names, self.weight(names[0]).device):
            advance()

    def prepare(self, name: str, fmt: Format) -> None:
        """Make one rendering, unless it is there."""
        self._grid(name, fmt)

    def rows(
        self, name: str, fmt: Format, rows: Rows = slice(None), out: Tensor | None = None
    ) -> Tensor:
        """The dequantized rows of a matrix in a format, float32 [rows, cols]."""
        return render(self.weight(name)[rows], fmt, grid_rows(self._grid(name, fmt), rows), out)

    def packed(self, name: str, fmt: Format) -> PackedTensor:
        """A matrix as it is stored in a format: decodes to :meth:`rows` bit for bit."""
        return PackedTensor.pack(self.weight(name), fmt, self._grid(name, fmt))

    def _grid(self, name: str, fmt: Format) -> Fitted | None:
        key = (name, fmt.name)
        if key not in self._grids:
            self._grids[key] = self._method(self.weight(name), fmt)
        return self._grids[key]

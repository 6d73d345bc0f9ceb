"""What families of codes with scales have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ..format import PER_TENSOR, Family, Format, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Grid, Line


class Codes(Family["Grid"]):
    """b-bit codes on lines: rounding to nearest by a grid, and the common way to store them.

    ``codes`` are packed LSB-first, each row starting at a byte; ``scale`` is float16; ``zero``,
    unless the format is symmetric, is one LSB-first stream of b-bit zero points in the order of
    the scales.

    Attributes:
        main: The stored part with a row for every row of the weight, which holds the codes.
    """

    main: ClassVar[str] = "codes"

    def tensors(self, fmt: Format, shape: tuple[int, int]) -> Tensors:
        """See :class:`Family`."""
        rows, cols = shape
        scales = (1, 1) if fmt.group_size == PER_TENSOR else (rows, fmt.groups(cols))
        parts: Tensors = {
            "codes": ((rows, math.ceil(cols * fmt.bits / 8)), "uint8"),
            "scale": (scales, "float16"),
        }
        if not fmt.symmetric:
            parts["zero"] = ((math.ceil(math.prod(scales) * fmt.bits / 8),), "uint8")
        return parts

    def line(self, fmt: Format, grid: Grid) -> Line:
        """Scale times what stands for a code: its level, or itself less the zero point."""
        import torch

        from ..lines import Line

        scale = grid.scale.float()
        if fmt.levels is not None:
            levels = torch.tensor(fmt.levels, dtype=torch.float32, device=scale.device)
            return Line(scale, torch.tensor(0.0), None, levels)
        zero = torch.tensor(fmt.zero_point) if grid.zero is None else grid.zero.float()
        return Line(scale, zero)

    def refit(
        self, weight: Tensor, fmt: Format, grid: Grid, codes: Tensor, hessian: Tensor
    ) -> Grid:
        """The scales by least squares, if they are stored as they are; zero points stay."""
        import torch

        from ..grid import decode
        from ..refit import refit_scales

        line = self.line(fmt, grid)
        if line.offset is not None or not torch.equal(line.scale, grid.scale.float()):
            return grid
        levels = decode(codes, fmt, grid._replace(scale=torch.ones_like(grid.scale)))
        scale = refit_scales(weight.float(), levels, grid.scale, hessian, fmt.group_size)
        return grid._replace(scale=scale)

    def render(self, weight: Tensor, fmt: Format, fitted: Grid, out: Tensor) -> None:
        """s * (clamp(round(w/s + z), 0, 2^b - 1) - z); a group with scale 0 renders to 0."""
        from ..lines import dequantize, round_to_codes, row_chunks

        for rows in row_chunks(weight.shape):
            line = self.line(fmt, fitted.rows(rows))
            round_to_codes(weight[rows], line, fmt.bits, fmt.group_size, out[rows])
            dequantize(out[rows], line, fmt.group_size)

    def pack(self, weight: Tensor, fmt: Format, fitted: Grid) -> dict[str, Tensor]:
        """See :class:`Family`."""
        import torch

        from ..grid import encode
        from ..lines import row_chunks

        stored = []
        for rows in row_chunks(weight.shape):
            part = fitted.rows(rows)
            stored.append(self.store_rows(encode(weight[rows], fmt, part), fmt, part))
        return {self.main: torch.cat(stored), **self.store_grid(fmt, fitted)}

    def store(self, codes: Tensor, fmt: Format, grid: Grid) -> dict[str, Tensor]:
        """See :class:`Family`."""
        return {self.main: self.store_rows(codes, fmt, grid), **self.store_grid(fmt, grid)}

    def store_rows(self, codes: Tensor, fmt: Format, grid: Grid) -> Tensor:
        """The stored part ``main`` of some rows, uint8 [rows, bytes], for codes [rows, cols]."""
        from ..packed import pack_bits

        return pack_bits(codes, fmt.bits)

    def store_grid(self, fmt: Format, grid: Grid) -> dict[str, Tensor]:
        """The other stored parts."""
        from ..packed import pack_bits

        parts = {"scale": grid.scale.contiguous()}
        if grid.zero is not None:
            parts["zero"] = pack_bits(grid.zero.reshape(1, -1), fmt.bits)[0]
        return parts

    def rescale(self, fmt: Format, tensors: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """See :class:`Family`."""
        return {**tensors, **self.store_grid(fmt, grid)}

    def grid(self, fmt: Format, tensors: Mapping[str, Tensor]) -> Grid:
        """See :class:`Family`."""
        from ..lines import Grid
        from ..packed import unpack_bits

        scale = tensors["scale"]
        if fmt.symmetric:
            return Grid(scale, None)
        zero = unpack_bits(tensors["zero"].view(1, -1), fmt.bits, scale.numel())
        return Grid(scale, zero.view(scale.shape))

    def grid_of_rows(
        self, fmt: Format, tensors: Mapping[str, Tensor], rows: slice | Tensor
    ) -> Grid:
        """The grid of some rows, from the bytes that hold their zero points and no others."""
        import torch

        from ..lines import Grid
        from ..packed import bits_at

        scale = tensors["scale"]
        everything = isinstance(rows, slice) and rows == slice(None)
        if fmt.symmetric or len(scale) == 1 or everything:
            return self.grid(fmt, tensors).rows(rows)
        count, groups = scale.shape
        if isinstance(rows, slice):
            rows = torch.arange(count, device=scale.device)[rows]
        elif rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        places = (rows % count)[:, None] * groups + torch.arange(groups, device=scale.device)
        return Grid(scale[rows], bits_at(tensors["zero"], fmt.bits, places))

    def decode(
        self, fmt: Format, cols: int, tensors: Mapping[str, Tensor], rows: slice | Tensor
    ) -> Tensor:
        """See :class:`Family`."""
        from ..grid import decode
        from ..packed import unpack_bits

        packed = tensors["codes"][rows]
        if (found := self._decode_at_once(fmt, cols, tensors, packed, rows)) is not None:
            return found
        grid = self.grid_of_rows(fmt, tensors, rows)
        return decode(unpack_bits(packed, fmt.bits, cols), fmt, grid)

    def _decode_at_once(
        self,
        fmt: Format,
        cols: int,
        tensors: Mapping[str, Tensor],
        packed: Tensor,
        rows: slice | Tensor,
    ) -> Tensor | None:
        """The rows of a slice in one compiled pass; None where that cannot be."""
        from ..lines import Grid
        from ..native_decoding import decode

        if not isinstance(rows, slice) or rows.step not in (None, 1):
            return None
        scale, zeros = tensors["scale"], None
        if fmt.group_size == PER_TENSOR:
            line = self.line(fmt, self.grid(fmt, tensors))
        else:
            line = self.line(fmt, Grid(scale[rows], None))
            if not fmt.symmetric:
                zeros = tensors["zero"], rows.indices(len(scale))[0] * scale.shape[1]
        return decode(packed, fmt.bits, cols, line, fmt.group_size, zeros)

"""Blocks of llama.cpp: codes and scales interleaved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..block_sizes import BLOCKS, INTEGER_BLOCKS
from ..format import Format, Tensors
from . import FAMILIES
from ._codes import Codes

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Grid, Line


@FAMILIES.register("blocks")
class Blocks(Codes):
    """Blocks of llama.cpp: 32 or 256 weights of a row with their scales interleaved.

    ``q4_0``, ``q5_0`` and ``q8_0`` are other names of ``int4-g32``, ``int5-g32`` and ``int8-g32``.
    What is stored is one tensor, ``blocks``, the bytes of a GGUF file; the last block of a row may
    be padded.

    >>> Format.parse("q4_0").name
    'int4-g32'
    >>> Format.parse("q6_k").tensors((2, 300))  # two blocks of 256 weights in 210 bytes
    {'blocks': ((2, 420), 'uint8')}

    References:
        The structures ``block_q4_1`` ... ``block_iq4_xs`` of ggml (MIT), ``ggml-common.h``.
    """

    grammar = f"{', '.join(BLOCKS)} of llama.cpp"
    examples = ("q4_1", "iq4_nl", "mxfp4", "q2_k", "q3_k", "q6_k", "iq4_xs")
    main = "blocks"

    def parse(self, text: str) -> Format | None:
        """See :class:`Family`."""
        if text in INTEGER_BLOCKS:
            return Format.parse(INTEGER_BLOCKS[text])
        if not (block := BLOCKS.get(text)):
            return None
        return Format(
            text,
            "blocks",
            block.bits,
            block.group_size,
            block.symmetric,
            block_size=block.block_size,
        )

    def names(self) -> Iterable[str]:
        """All of them."""
        return BLOCKS

    def tensors(self, fmt: Format, shape: tuple[int, int]) -> Tensors:
        """One tensor, ``blocks``."""
        rows, cols = shape
        row = math.ceil(cols / fmt.block_size) * BLOCKS[fmt.name].nbytes
        return {"blocks": ((rows, row), "uint8")}

    def reach(self, fmt: Format, low: float, high: float) -> float:
        """The largest scale, about."""
        return max(-low, high) / 8

    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Grid:
        """Group by group, then the scales of the block."""
        from ..block_fit import fit_blocks

        return fit_blocks(weight, fmt, importance)

    def refit(
        self, weight: Tensor, fmt: Format, grid: Grid, codes: Tensor, hessian: Tensor
    ) -> Grid:
        """The integers of groups, and the scales of blocks."""
        from ..block_refit import refit_blocks

        return refit_blocks(weight, fmt, grid, codes, hessian)

    def line(self, fmt: Format, grid: Grid) -> Line:
        """See ``blocks.Layout``."""
        from ..blocks import block_line

        return block_line(fmt, grid)

    def store_rows(self, codes: Tensor, fmt: Format, grid: Grid) -> Tensor:
        """Codes and scales as the bytes of blocks."""
        from torch.nn.functional import pad

        from ..blocks import pack_blocks

        return pack_blocks(fmt.name, pad(codes, (0, -codes.shape[1] % fmt.block_size)), *grid)

    def store_grid(self, fmt: Format, grid: Grid) -> dict[str, Tensor]:
        """Nothing else: scales are in the blocks."""
        return {}

    def rescale(self, fmt: Format, tensors: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """Those of the blocks; scales of groups are integers and stay."""
        from ..blocks import with_scales

        return {"blocks": with_scales(fmt.name, tensors["blocks"], grid.scale, grid.zero)}

    def grid(self, fmt: Format, tensors: Mapping[str, Tensor]) -> Grid:
        """See :class:`Family`."""
        from ..blocks import unpack_blocks
        from ..lines import Grid

        return Grid(*unpack_blocks(fmt.name, tensors["blocks"])[1:])

    def decode(
        self, fmt: Format, cols: int, tensors: Mapping[str, Tensor], rows: slice | Tensor
    ) -> Tensor:
        """See :class:`Family`."""
        from ..blocks import unpack_blocks
        from ..grid import decode
        from ..lines import Grid

        codes, d, *rest = unpack_blocks(fmt.name, tensors["blocks"][rows])
        return decode(codes[:, :cols], fmt, Grid(d, *rest))

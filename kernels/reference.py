"""The oracle: unpack some rows, dequantize them, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantizers.grid import decode, grid_rows, row_chunks
from ..quantizers.packed import PackedTensor, unpack_bits


def linear(x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` with the dequantized weight W [rows, cols].

    Rows are dequantized in chunks, so at most a few megabytes of W exist at a time.

    Args:
        x: Inputs [..., cols]; its dtype is the dtype of the product and of the result.
        weight: The packed weight, in an integer format.
        bias: [rows] or None.

    Returns:
        Outputs [..., rows].
    """
    grid = weight.grid()
    assert grid is not None
    cols = weight.shape[1]
    outputs = []
    for some in row_chunks(weight.shape):
        codes = unpack_bits(weight.tensors["codes"][some], weight.fmt.bits, cols)
        plain = decode(codes, weight.fmt, grid_rows(grid, some)).to(x.dtype)
        outputs.append(torch.nn.functional.linear(x, plain, None if bias is None else bias[some]))
    return torch.cat(outputs, dim=-1)


def dequantize_rows(weight: PackedTensor, rows: Tensor | None) -> Tensor:
    """The rows with the given indices [n], or all rows, of W as float32 [n, cols]."""
    if rows is None:
        return weight.dequantize()
    grid = weight.grid()
    assert grid is not None
    codes = unpack_bits(weight.tensors["codes"][rows], weight.fmt.bits, weight.shape[1])
    return decode(codes, weight.fmt, grid_rows(grid, rows))

"""Packed codes to weights in one compiled pass: ``decoding.cpp``, for weights on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .._base.native import Library
from .lines import Line

SOURCE = Path(__file__).with_name("decoding.cpp")
ABI = 2  # what bitplan_abi() says


def decode(
    packed: Tensor,
    bits: int,
    cols: int,
    line: Line,
    size: int,
    zeros: tuple[Tensor, int] | None = None,
) -> Tensor | None:
    """What ``lines.dequantize`` makes of the codes that ``packed.unpack_bits`` finds, bit for bit.

    Args:
        packed: Codes of b bits, LSB-first, each row from a byte: uint8 [rows, bytes].
        bits: b, from 1 to 8.
        cols: Codes in a row.
        line: What codes stand for; one zero point for all.
        size: Columns of a group; 0 or less for all.
        zeros: Zero points of the groups instead: a stream of b-bit codes, LSB-first, uint8 [n],
            and the number of the first one in it.

    Returns:
        float32 [rows, cols]; None where it has to be done otherwise: not on a CPU, without a
        compiler, while torch compiles, or with offsets or groups that begin within a byte.
    """
    size = size if size > 0 else cols
    if packed.device.type != "cpu" or line.offset is not None or torch.compiler.is_compiling():
        return None
    if size % 8 and size < cols:
        return None
    if line.levels is not None and line.levels.dim() == 2:
        return None
    library, _ = LIBRARY.find()
    if library is None:
        return None
    rows, groups = len(packed), -(-cols // size)
    packed, scale = packed.contiguous(), line.scale.expand(rows, groups).contiguous()
    stream, first = (zeros[0].contiguous(), zeros[1]) if zeros else (None, 0)
    levels = None if line.levels is None else line.levels.contiguous()
    out = torch.empty(rows, cols)
    library.bitplan_decode(
        packed.data_ptr(),
        scale.data_ptr(),
        None if stream is None else stream.data_ptr(),
        first,
        None if levels is None else levels.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        packed.shape[1],
        groups,
        size,
        float(line.zero),
        bits,
    )
    return out


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    function = loaded.bitplan_decode
    function.argtypes = (
        *(pointer, pointer, pointer, int64, pointer, pointer),
        *(int64,) * 5,
        *(ctypes.c_float, ctypes.c_int32),
    )
    function.restype = None


LIBRARY = Library("decoding loop", (SOURCE,), ABI, _declare)

"""Packed codes to weights in one compiled pass: ``decoding.cpp``, for weights on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .._base.native import Library
from .lines import Line

SOURCE = Path(__file__).with_name("decoding.cpp")
ABI = 1  # what bitplan_abi() says


def decode(packed: Tensor, bits: int, cols: int, line: Line, size: int) -> Tensor | None:
    """What ``lines.dequantize`` makes of the codes that ``packed.unpack_bits`` finds, bit for bit.

    Args:
        packed: Codes of b bits, LSB-first, each row from a byte: uint8 [rows, bytes].
        bits: b, from 1 to 8.
        cols: Codes in a row.
        line: What codes stand for.
        size: Columns of a group; 0 or less for all.

    Returns:
        float32 [rows, cols]; None where it has to be done otherwise: not on a CPU, without a
        compiler, while torch compiles, or with offsets or groups that begin within a byte.
    """
    size = size if size > 0 else cols
    if packed.device.type != "cpu" or line.offset is not None or torch.compiler.is_compiling():
        return None
    if size % 8 and size < cols:
        return None
    library, _ = LIBRARY.find()
    if library is None:
        return None
    rows, groups = len(packed), -(-cols // size)
    packed, scale = packed.contiguous(), line.scale.expand(rows, groups).contiguous()
    zeros = line.zero.expand(rows, groups).contiguous() if line.zero.dim() else None
    levels = None if line.levels is None else line.levels.contiguous()
    out = torch.empty(rows, cols)
    library.bitplan_decode(
        packed.data_ptr(),
        scale.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if levels is None else levels.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        packed.shape[1],
        groups,
        size,
        0.0 if line.zero.dim() else float(line.zero),
        bits,
    )
    return out


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    function = loaded.bitplan_decode
    function.argtypes = (pointer,) * 5 + (int64,) * 5 + (ctypes.c_float, ctypes.c_int32)
    function.restype = None


LIBRARY = Library("decoding loop", (SOURCE,), ABI, _declare)

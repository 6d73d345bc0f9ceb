"""Inner products of gradients and errors, and of their squares: ``products.cpp``, on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .._base.native import Library

SOURCE = Path(__file__).with_name("products.cpp")
ABI = 1  # what bitplan_abi() says


def products(gradients: Tensor, errors: Tensor) -> tuple[Tensor, Tensor] | None:
    """``G E^T`` and ``G^2 (E^2)^T`` in one pass over both, without a copy of either.

    Args:
        gradients: G [samples, size], float32.
        errors: E [formats, size], float32.

    Returns:
        Both float64 [samples, formats]; None where it has to be done otherwise, not on a CPU or
        without a compiler.
    """
    if gradients.device.type != "cpu" or gradients.dtype != torch.float32:
        return None
    library, _ = LIBRARY.find()
    if library is None:
        return None
    gradients, errors = gradients.contiguous(), errors.contiguous()
    shape = (len(gradients), len(errors))
    sums, squares = torch.zeros(2, *shape, dtype=torch.float64)
    library.bitplan_products(
        gradients.data_ptr(),
        errors.data_ptr(),
        *shape,
        gradients.shape[1],
        sums.data_ptr(),
        squares.data_ptr(),
    )
    return sums, squares


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    loaded.bitplan_products.argtypes = (pointer, pointer, int64, int64, int64, pointer, pointer)
    loaded.bitplan_products.restype = None


LIBRARY = Library("products of the profile", (SOURCE,), ABI, _declare)

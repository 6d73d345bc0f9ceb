"""Tensors as plain bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    r"""The bytes of a tensor's entries in order, for hashes; no copy if they lie together on a CPU.

    >>> bytes(bytes_of(torch.tensor([1.0, 2.0], dtype=torch.float16)))
    b'\x00<\x00@'
    """
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(plain.numpy())  # type: ignore[arg-type]

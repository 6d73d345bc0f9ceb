"""Choosing how ``plane_gemm`` is launched: by rule, by a latency model, by measurement."""

from __future__ import annotations

from torch import Tensor

from .packing import PlanePack
from .triton_launch import Launch, natural_warps


def choose_launch(x: Tensor, pack: PlanePack) -> Launch:
    """How to multiply ``x`` [M, K] by a pack."""
    smallest = 16 if pack.order == "amd" else 8
    tokens = smallest
    while tokens < min(len(x), 32):
        tokens *= 2
    return Launch(tokens, natural_warps(pack), 2, 1)

"""Embeddings: rows that are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.packed import PackedTensor
from ..packed_modules import PackedEmbedding
from . import SITES, Site, runs_code_of


class Embedding(Site):
    """A table [entries, features]."""

    layer_type = "embedding"
    lookups = True
    by_index = True

    def takes(self, module: nn.Module, attribute: str, weight: Tensor) -> bool:
        """The weight of ``nn.Embedding`` and its subclasses."""
        return isinstance(module, nn.Embedding) and attribute == "weight"

    def matrix(self, module: nn.Module, attribute: str, weight: Tensor) -> Tensor:
        """The table itself."""
        return weight

    def scale(self, module: nn.Module) -> float | None:
        """1 for a table with the code of torch, what is seen for one with its own."""
        known: Any = module
        if known.max_norm is not None:
            return None
        return 1.0 if runs_code_of(module, nn.Embedding) else _scale(module)

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """Row indices [samples, positions]."""
        return x.reshape(samples, -1).contiguous()

    def deltas(self, module: nn.Module, delta: Tensor, samples: int) -> Tensor:
        """Output gradients [samples, positions, 1, features]."""
        return delta.reshape(samples, -1, 1, delta.shape[-1])

    def kernels(self, module: nn.Module) -> bool:
        """A table with the code of torch that changes no row when it is looked up."""
        known: Any = module
        return runs_code_of(module, nn.Embedding) and known.max_norm is None

    def packed(self, module: nn.Module, packed: PackedTensor) -> nn.Module:
        """A table whose rows are dequantized when they are looked up."""
        like: Any = module.weight
        return PackedEmbedding(packed, None, like)


@torch.no_grad()
def _scale(module: nn.Module) -> float | None:
    """The multiple of the rows that a subclass gives, whichever they are."""
    weight: Any = module.weight
    if weight.is_meta:
        return None
    rows = torch.randint(len(weight), (2, 5), generator=torch.Generator().manual_seed(0))
    rows = rows.to(weight.device)
    try:
        found = module(rows)
    except Exception:  # whatever a table's own code does with indices it was not made for
        return None
    plain = weight[rows]
    if not isinstance(found, Tensor) or found.shape != plain.shape:
        return None
    ratio = (found * plain).sum() / plain.square().sum()
    same = torch.allclose(found, ratio * plain, rtol=1e-5, atol=1e-6 * float(found.abs().max()))
    return float(ratio) if same else None


SITES.register("embedding")(Embedding())

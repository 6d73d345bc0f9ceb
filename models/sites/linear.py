"""Linear layers: ``nn.Linear`` with its subclasses, and the transposed ``Conv1D`` of GPT-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...quantizers.packed import PackedTensor
from ..packed_modules import PackedLinear
from ..packed_rows import PackedRowsLinear
from . import SITES, Site, runs_code_of

_CONV1D = "transformers.pytorch_utils.Conv1D"  # by name: transformers need not be loaded


class Linear(Site):
    """A weight [out, in] that multiplies every input vector."""

    layer_type = "linear"

    def takes(self, module: nn.Module, attribute: str, weight: Tensor) -> bool:
        """The weight of a linear layer."""
        known = isinstance(module, nn.Linear) or conv1d_of(module) is not None
        return known and attribute == "weight" and weight.dim() == 2

    def matrix(self, module: nn.Module, attribute: str, weight: Tensor) -> Tensor:
        """The weight itself; of a ``Conv1D`` its transpose."""
        return weight if isinstance(module, nn.Linear) else weight.T

    def restored(
        self, module: nn.Module, attribute: str, matrix: Tensor, shape: torch.Size
    ) -> Tensor:
        """The matrix itself; of a ``Conv1D`` its transpose."""
        return matrix if isinstance(module, nn.Linear) else matrix.T

    def scale(self, module: nn.Module) -> float | None:
        """1 for a layer with the code of its class, what is seen for one with its own."""
        return 1.0 if self.kernels(module) else _scale(module)

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """Inputs as they are: [samples, positions, 1, cols]."""
        return x.reshape(samples, -1, 1, x.shape[-1])

    def deltas(self, module: nn.Module, delta: Tensor, samples: int) -> Tensor:
        """Output gradients as they are: [samples, positions, 1, rows]."""
        return delta.reshape(samples, -1, 1, delta.shape[-1])

    def kernels(self, module: nn.Module) -> bool:
        """A layer with the code of its class."""
        original = nn.Linear if isinstance(module, nn.Linear) else conv1d_of(module)
        return original is not None and runs_code_of(module, original)

    def packed(self, module: nn.Module, packed: PackedTensor) -> nn.Module:
        """A layer that multiplies by the packed weight."""
        bias: Any = module.bias
        like: Any = module.weight
        return PackedLinear(packed, bias, like, transposed=not isinstance(module, nn.Linear))

    def packed_rows(
        self, module: nn.Module, parts: list[tuple[PackedTensor, Tensor]]
    ) -> nn.Module | None:
        """A layer that multiplies by all parts."""
        bias: Any = module.bias
        like: Any = module.weight
        return PackedRowsLinear(parts, bias, like, transposed=not isinstance(module, nn.Linear))


def conv1d_of(module: nn.Module) -> type[nn.Module] | None:
    """The ``Conv1D`` class of transformers, if the module is one."""
    for kind in type(module).__mro__:
        if f"{kind.__module__}.{kind.__qualname__}" == _CONV1D:
            return kind
    return None


@torch.no_grad()
def _scale(module: nn.Module) -> float | None:
    """The multiple of ``x W' + b`` that a subclass of ``nn.Linear`` computes, large inputs too."""
    weight: Any = module.weight
    bias: Any = module.bias
    if not isinstance(module, nn.Linear) or weight.is_meta:
        return None
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    ratios = []
    for inputs in (x, 1000 * x):
        plain = linear(inputs, weight, bias)
        try:
            found = module(inputs)
        except Exception:  # whatever a layer's own code does with inputs it was not made for
            return None
        if not isinstance(found, Tensor) or found.shape != plain.shape:
            return None
        ratio = (found * plain).sum() / plain.square().sum()
        if not torch.allclose(
            found, ratio * plain, rtol=1e-4, atol=1e-5 * float(found.abs().max())
        ):
            return None
        ratios.append(float(ratio))
    return ratios[0] if abs(ratios[0] - ratios[1]) <= 1e-4 * abs(ratios[0]) else None


SITES.register("linear")(Linear())

"""Any other parameter with two or more dimensions, whatever its module computes with it."""

from __future__ import annotations

from torch import Tensor, nn

from . import FALLBACK, SITES, Site


class Generic(Site):
    """A parameter that is read as a whole; its gradient comes from autograd."""

    def takes(self, module: nn.Module, attribute: str, weight: Tensor) -> bool:
        """Everything."""
        return True

    def matrix(self, module: nn.Module, attribute: str, weight: Tensor) -> Tensor:
        """All but the last dimension as rows; of four and more, the first alone (a kernel)."""
        return weight.flatten(1) if weight.dim() > 3 else weight.flatten(0, -2)


SITES.register(FALLBACK)(Generic())

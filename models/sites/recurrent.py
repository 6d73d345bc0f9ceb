"""Recurrent layers: LSTM, GRU and plain ones, with their cells."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import SITES, Site


class Recurrent(Site):
    """The weights [gates * hidden, in] of a layer that torch runs as one operator."""

    layer_type = "recurrent"

    def takes(self, module: nn.Module, attribute: str, weight: Tensor) -> bool:
        """All weights of the recurrent modules of torch."""
        return isinstance(module, nn.RNNBase | nn.RNNCellBase) and weight.dim() == 2

    def matrix(self, module: nn.Module, attribute: str, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def methods(self, kind: type[nn.Module], packed: bool) -> dict[str, Any]:
        """Give the operator what stands for the weights: a module keeps a list of its own."""
        if not issubclass(kind, nn.RNNBase):
            return {}
        original: Any = kind.forward
        move: Any = kind._apply

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._flat_weights
            self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
            try:
                return original(self, *args, **kwargs)
            finally:
                self._flat_weights = before

        def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = move(self, *args, **kwargs)
            RECURRENT.forget(self)
            return result

        return {"forward": forward} | ({"_apply": _apply} if packed else {})

    def forget(self, module: nn.Module) -> None:
        """The original weights in the module's own list."""
        known: Any = module
        if isinstance(module, nn.RNNBase):
            kept = [module._parameters.get(name) for name in known._flat_weights_names]
            known._flat_weights = kept


RECURRENT = Recurrent()
SITES.register("recurrent")(RECURRENT)

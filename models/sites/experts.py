"""Experts: the 3-D parameters that hold a layer's experts, and lists of expert modules."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from . import SITES, Site

_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_experts",
    "n_routed_experts",
    "num_routed_experts",
)
_HIDDEN = ("hidden_size", "hidden_dim", "d_model", "embed_dim")


class Experts(Site):
    """E weights in one parameter, [E, out, in] or [E, in, out]: the matrix [E * out, in]."""

    layer_type = "experts"
    by_index = True
    stacked = True

    def takes(self, module: nn.Module, attribute: str, weight: Tensor) -> bool:
        """A parameter with three dimensions, the first of which counts experts."""
        if weight.dim() != 3:
            return False
        counts = [getattr(module, name, None) for name in _COUNTS]
        named = "expert" in type(module).__name__.lower() or "expert" in attribute.lower()
        return weight.shape[0] in counts or (named and weight.shape[0] > 1)

    def matrix(self, module: nn.Module, attribute: str, weight: Tensor) -> Tensor:
        """[E * out, in]: a view of [E, out, in], a copy of [E, in, out]."""
        if is_transposed(module, attribute, weight.shape):
            weight = weight.transpose(1, 2)
        return weight.flatten(0, 1)

    def restored(
        self, module: nn.Module, attribute: str, matrix: Tensor, shape: torch.Size
    ) -> Tensor:
        """See :meth:`Site.restored`: a view."""
        experts: Tensor = matrix.unflatten(0, (shape[0], -1))
        return experts.transpose(1, 2) if is_transposed(module, attribute, shape) else experts

    def methods(self, kind: type[nn.Module], packed: bool) -> dict[str, Any]:
        """Packed experts run the plain loop over the experts that tokens reach.

        Other implementations read all experts at every call.
        """
        plain = inspect.unwrap(kind.forward)
        return {"forward": plain} if packed and plain is not kind.forward else {}


def is_transposed(module: nn.Module, attribute: str, shape: torch.Size) -> bool:
    """Whether a parameter is [E, in, out], as the module says or its sizes tell."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = next((size for name in _HIDDEN if (size := getattr(module, name, None))), None)
    if hidden is None or (shape[1] == hidden) == (shape[2] == hidden):
        return False
    ends_there = "down" in attribute or attribute in ("w2", "wo")  # back in the hidden state
    return bool((shape[2] == hidden) == ends_there)


def expert_of(path: str, model: nn.Module) -> tuple[str, int] | None:
    """The common name of a matrix in a list of experts, and the number of its expert.

    ``layers.0.moe.experts.3.up`` is number 3 of ``layers.0.moe.experts.*.up``.
    """
    names = path.split(".")
    for i, name in enumerate(names[:-1]):
        number = re.search(r"\d+$", names[i + 1])
        if "expert" in name.lower() and number:
            parent = model.get_submodule(".".join(names[: i + 1]))
            if isinstance(parent, nn.ModuleList | nn.ModuleDict):
                return ".".join([*names[: i + 1], "*", *names[i + 2 :]]), int(number[0])
    return None


SITES.register("experts")(Experts())

"""Sites: the places in a model where a weight is used, one file per kind of module.

A site knows which parameters it takes, the matrix [rows, cols] each of them is, how the gradient
of one is had, and what stands for it when it is packed.  Nothing else in the package names module
classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..._base.registry import Registry
from ...quantizers.packed import PackedTensor


class Site:
    """What is done with the parameters of one kind of module.

    Attributes:
        layer_type: What costs must know of a unit: ``linear`` (a product with every input vector,
            by kernels that read the packed weight), ``embedding`` (rows are looked up),
            ``convolution``, ``recurrent``, ``experts`` or ``other``.
        lookups: Whether inputs are row indices instead of vectors.
        by_index: Whether who reads the parameter often takes a few of its leading indices only.
        stacked: Whether the leading index counts matrices of their own, one below the other, of
            which each input reaches some: experts.
    """

    layer_type: ClassVar[str] = "other"
    lookups: ClassVar[bool] = False
    by_index: ClassVar[bool] = False
    stacked: ClassVar[bool] = False

    def takes(self, module: nn.Module, attribute: str, weight: Tensor) -> bool:
        """Whether a parameter with two or more dimensions belongs here."""
        raise NotImplementedError

    def matrix(self, module: nn.Module, attribute: str, weight: Tensor) -> Tensor:
        """A tensor of the parameter's shape as a matrix [rows, cols], rows = output features.

        Groups of weights run along a row.  A view wherever one exists.
        """
        raise NotImplementedError

    def restored(
        self, module: nn.Module, attribute: str, matrix: Tensor, shape: torch.Size
    ) -> Tensor:
        """Invert :meth:`matrix`: a matrix as a tensor of ``shape``; a view wherever one exists."""
        return matrix.reshape(shape)

    def scale(self, module: nn.Module) -> float | None:
        """The multiple of the product of input and weight that a call gives; None if it is none.

        Where there is one, :meth:`inputs` and :meth:`deltas` give the factors of the weight's
        gradient, which is checked against autograd before it is relied on.
        """
        return None

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """What multiplies the matrix, per sample: [samples, positions, channel_groups, cols].

        Row indices [samples, positions] where :attr:`lookups`.
        """
        raise NotImplementedError

    def deltas(self, module: nn.Module, delta: Tensor, samples: int) -> Tensor:
        """The gradient at the module's output: [samples, positions, channel_groups, rows / g]."""
        raise NotImplementedError

    def kernels(self, module: nn.Module) -> bool:
        """Whether :meth:`packed` gives a module of its own, without the original's code."""
        return False

    def packed(self, module: nn.Module, packed: PackedTensor) -> nn.Module:
        """What stands for the whole module when its weight is packed; see :meth:`kernels`."""
        raise NotImplementedError

    def packed_rows(
        self, module: nn.Module, parts: list[tuple[PackedTensor, Tensor]]
    ) -> nn.Module | None:
        """:meth:`packed` for a weight in parts, each with some rows; None to have it read."""
        return None

    def methods(self, kind: type[nn.Module], packed: bool) -> dict[str, Any]:
        """Methods that a class needs besides while something else stands for its parameters."""
        return {}

    def forget(self, module: nn.Module) -> None:
        """Drop what a module keeps of the parameters that packed weights stand for now."""


SITES: Registry[Site] = Registry("site", __name__)
FALLBACK = "generic"  # takes what no other site does


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One parameter of a module, seen as a matrix.

    Attributes:
        path: Name of the module in the model.
        attribute: Name of the parameter in the module.
        module: The module.
        site: What is done with it.
        site_name: The name of ``site``.
    """

    path: str
    attribute: str
    module: nn.Module
    site: Site
    site_name: str

    @property
    def key(self) -> str:
        """The parameter's name in the ``state_dict`` of the model."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def name(self) -> str:
        """The matrix's name: the key without a trailing ``.weight``."""
        return self.key.removesuffix(".weight")

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, also while something else is read in its place."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix."""
        empty = torch.empty(self.parameter.shape, device="meta")
        rows, cols = self.site.matrix(self.module, self.attribute, empty).shape
        return rows, cols

    @property
    def layer_type(self) -> str:
        """See :attr:`Site.layer_type`; a linear layer with code of its own reads a dense weight."""
        if self.site.layer_type == "linear" and not self.site.kernels(self.module):
            return "dense linear"
        return self.site.layer_type

    @property
    def blocks(self) -> int:
        """Matrices that the rows divide into evenly: see :attr:`Site.stacked`."""
        return len(self.parameter) if self.site.stacked else 1

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the parameter's shape as a matrix [rows, cols]."""
        return self.site.matrix(self.module, self.attribute, weight)

    def restored(self, matrix: Tensor) -> Tensor:
        """A matrix as a tensor of the parameter's shape."""
        return self.site.restored(self.module, self.attribute, matrix, self.parameter.shape)


def places(model: nn.Module) -> list[Place]:
    """Every floating point parameter with two or more dimensions, in module order.

    A parameter that several modules share has a place in each.
    """
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1 and parameter.is_floating_point():
                name = site_of(module, attribute, parameter)
                found.append(Place(path, attribute, module, SITES.get(name), name))
    return found


def site_of(module: nn.Module, attribute: str, parameter: Tensor) -> str:
    """The name of the site that takes a parameter."""
    for name in _specific():
        if SITES.get(name).takes(module, attribute, parameter):
            return name
    return FALLBACK


@cache
def _specific() -> tuple[str, ...]:
    return tuple(name for name in SITES.names() if name != FALLBACK)


def entries_of(
    site: Site,
    module: nn.Module,
    attribute: str,
    shape: torch.Size,
    indices: Tensor,
    rows: Callable[[Tensor], Tensor],
) -> Tensor:
    """Some leading indices of a parameter, where these are rows of its matrix next to each other.

    Args:
        site: Its site, one that reads :attr:`Site.by_index`.
        module: Its module.
        attribute: Its name in the module.
        shape: Of the whole parameter.
        indices: Which entries [n].
        rows: Gives rows [n * block, cols] of the matrix by index.
    """
    whole = site.matrix(module, attribute, torch.empty(shape, device="meta"))
    block = len(whole) // shape[0]
    wanted = indices[:, None] * block + torch.arange(block, device=indices.device)
    found = torch.Size((len(indices), *shape[1:]))
    return site.restored(module, attribute, rows(wanted.flatten()), found)


def runs_code_of(module: nn.Module, owner: type[nn.Module]) -> bool:
    """Whether a call of the module runs ``owner.forward`` itself, not a subclass's own."""
    return type(module).forward is owner.forward and "forward" not in module.__dict__

"""A model run with the weights that formats really produce."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .._base.progress import Reporter
from ..quantizers.format import Format
from ..quantizers.store import Renderings, Rows
from .find import is_conv1d, weight_matrix
from .units import UnitInfo

Assignment = Mapping[str, Format]  # canonical module name -> format
T = TypeVar("T")


class Renderer:
    """Runs a model with any unit's matrix in any format, without keeping rendered weights.

    Args:
        model: The module that holds the original weights.
        units: The units; only their matrices are rendered.
        rounding: Name of the rounding method.
        folder: Where the store keeps codes that cannot be recomputed; None for memory.

    Attributes:
        store: The renderings.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[UnitInfo],
        rounding: str = "rtn",
        folder: Path | None = None,
    ) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._modules: dict[str, nn.Module] = {}
        self._canonical: dict[nn.Module, str] = {}
        for unit in units:
            for name in (*unit.modules, *unit.aliases):
                module = modules[name]
                owner = name if name in unit.modules else _owner(unit, module, modules)
                self._modules.setdefault(owner, module)
                self._canonical[module] = owner
        self.store = Renderings(self.weight, rounding, folder)

    @property
    def names(self) -> list[str]:
        """Canonical names of the matrices, in unit order."""
        return list(self._modules)

    def hooked_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Pairs of canonical name and module; tied modules appear under one name."""
        for module, name in self._canonical.items():
            yield name, module

    def weight(self, name: str) -> Tensor:
        """The original weight of a matrix [rows, cols], a view where possible."""
        matrix = weight_matrix(self._modules[name])
        assert matrix is not None
        return matrix.detach().float()

    def fit(self, formats: Sequence[Format], reporter: Reporter | None = None) -> None:
        """Make the renderings of all matrices that are not there yet."""
        self.store.fit(self.names, formats, reporter)

    def complete(self, formats: Sequence[Format], reporter: Reporter | None = None) -> None:
        """:meth:`fit` for the formats whose codes are kept; the others are fitted when needed."""
        self.store.complete(((name, fmt) for name in self.names for fmt in formats), reporter)

    def render(
        self, name: str, fmt: Format, rows: Rows = slice(None), out: Tensor | None = None
    ) -> Tensor:
        """The dequantized rows of a matrix in a format, float32 [rows, cols]."""
        return self.store.rows(name, fmt, rows, out)

    @contextmanager
    def applied(self, assignment: Assignment) -> Iterator[None]:
        """Run the model with rendered weights inside the block.

        Each module renders its weight just before its own forward pass and forgets it right
        after, so only one rendered matrix exists at a time; a backward pass renders it again.
        """
        self.store.complete(assignment.items())  # runs the model, so not while it is changed
        handles: list[Any] = []
        swaps: list[_WeightSwap] = []
        for name, module in self.hooked_modules():
            if name not in assignment:
                continue
            swap = _WeightSwap(self, name, assignment[name], module)
            swaps.append(swap)
            if type(module) is nn.Embedding:
                handles.append(module.register_forward_hook(swap.look_up, with_kwargs=True))
            else:
                handles.append(module.register_forward_pre_hook(swap.enter))
                handles.append(module.register_forward_hook(swap.leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for swap in swaps:
                swap.leave()  # after an interrupt inside a forward pass


class _WeightSwap:
    """Forward hooks that put a rendered weight in a module for the time of one call.

    What a backward pass needs of the rendered weight is rendered again when it is needed.
    """

    def __init__(self, renderer: Renderer, name: str, fmt: Format, module: nn.Module) -> None:
        self.renderer, self.name, self.fmt = renderer, name, fmt
        assert isinstance(module.weight, Tensor)
        self.weight, self.transposed = module.weight, is_conv1d(module)
        self.original: Tensor | None = None
        self.saving: saved_tensors_hooks | None = None

    def enter(self, *_: Any) -> None:
        matrix = self.renderer.render(self.name, self.fmt)
        self.original = self.weight.data
        self.weight.data = matrix.T if self.transposed else matrix.view(self.original.shape)
        if torch.is_grad_enabled():
            self.saving = saved_tensors_hooks(self._pack, self._unpack)
            self.saving.__enter__()

    def leave(self, *_: Any) -> None:
        if self.saving is not None:
            self.saving.__exit__()
            self.saving = None
        if self.original is not None:
            self.weight.data, self.original = self.original, None

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        if tensor.data_ptr() != self.weight.data_ptr():
            return tensor
        return _View(tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return self.renderer.render(self.name, self.fmt).as_strided(*saved)

    def look_up(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
    ) -> Tensor:
        """Render only the rows an embedding looks up."""
        rows, where = first_input(args, kwargs).unique(return_inverse=True)
        return F.embedding(where, self.renderer.render(self.name, self.fmt, rows))


class _View(NamedTuple):
    """How a saved tensor looks at the storage of a rendered matrix."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a unit's module, however the model passes it."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


def _owner(unit: UnitInfo, alias: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """The unit's module whose weight the alias shares."""
    pointer = weight_matrix(alias)
    assert pointer is not None
    for name in unit.modules:
        matrix = weight_matrix(modules[name])
        if matrix is not None and matrix.data_ptr() == pointer.data_ptr():
            return name
    raise AssertionError(f"alias of {unit.name} shares no weight with it")

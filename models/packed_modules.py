"""Modules that compute with packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.launch import PackedMeta, dequantize
from ..kernels.layouts import Layout, PlaneLayout, StoredLayout, prepare
from ..quantizers.packed import PackedTensor
from .lazy import LazyWeight


class PackedModule(nn.Module):
    """A weight [rows, cols] that is kept as the stored parts of a ``PackedTensor``.

    The parts are buffers under their own names (``codes``, ``scale``, ``zero``, or ``weight``
    for a float format), so the ``state_dict`` has the names of a checkpoint.  Moving the module
    to a device moves them; casting it to another dtype changes activations and bias only.
    """

    codes: Tensor
    scale: Tensor
    like: Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: PackedTensor, bias: nn.Parameter | None, like: Tensor) -> None:
        super().__init__()
        self.fmt = packed.fmt
        self.shape = packed.shape
        self.meta = PackedMeta.of(self.fmt, self.shape) if self.fmt.integer else None
        self._buffers.update(packed.tensors)  # one may be called weight, as what is read here
        self.bias = bias
        # An empty tensor that follows casts and moves: the dtype of an output that has no float
        # input, and the device of the module even where its parts stay in main memory.
        device = next(iter(packed.tensors.values())).device
        empty = torch.empty(0, dtype=like.dtype, device=device)
        self.register_buffer("like", empty, persistent=False)

    @property
    def weight(self) -> Any:
        """The weight for who reads it instead of calling the module: dequantized when it is used.

        Modules that ask a layer for the dtype of its weight, and those that multiply by it
        themselves, work as they did.
        """
        return LazyWeight(
            torch.Size(self.shape), self.like, lambda: self.rows(None, self.like.dtype), self._some
        )

    def _some(self, indices: Tensor) -> Tensor:
        return self.rows(indices, self.like.dtype)

    def packed(self) -> PackedTensor:
        """The packed weight; its tensors are this module's buffers."""
        return PackedTensor(self.fmt, self.shape, {name: self.part(name) for name in self._names()})

    def part(self, name: str) -> Tensor:
        """A stored part."""
        part = self._buffers[name]
        assert part is not None
        return part

    def _names(self) -> list[str]:
        return list(self.fmt.tensors(self.shape))

    def rows(self, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, or its rows with the given indices [n], as [n, cols]."""
        if self.meta is None:  # floats, and blocks, which are unpacked whole
            packed = self.packed()
            indices = _on(indices, next(iter(packed.tensors.values())))
            return packed.dequantize(indices, dtype).to(self.like.device)
        indices = _on(indices, self.codes)
        zero = self._buffers.get("zero")
        rows: Tensor = dequantize(self.codes, self.scale, zero, indices, *self.meta)
        return rows.to(self.like.device, dtype)

    def extra_repr(self) -> str:
        """The format and shape, for ``print(model)``."""
        return f"{self.shape[0]}, {self.shape[1]}, format={self.fmt}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        stored = {name: self.part(name) for name in self._names()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in stored.items():
            moved = self.part(name)
            if moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        return self


def _on(indices: Tensor | None, part: Tensor) -> Tensor | None:
    """Indices where a stored part is: in main memory, if a GPU has another layout of it."""
    return None if indices is None else indices.to(part.device)


class LaidOut:
    """What packed layers share that stand for a linear one, laid out for a device."""

    shape: tuple[int, int]

    @property
    def in_features(self) -> int:
        """As in ``nn.Linear``: the columns of the weight."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """As in ``nn.Linear``: the rows of the weight."""
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the layout: pointers mean nothing in a copy."""
        return self.__dict__ | {"_layout": None}


class PackedLinear(LaidOut, PackedModule):
    """Stands for ``nn.Linear`` and for the ``Conv1D`` of transformers.

    What the kernels of its device need is made at the first call, or by :meth:`prepare`, and made
    again after the module was moved or other parts were loaded.

    Args:
        packed: The weight.
        bias: Added to the outputs [rows].
        like: Has the dtype of outputs.
        transposed: Whether the module it stands for keeps its weight as [cols, rows].
    """

    def __init__(
        self,
        packed: PackedTensor,
        bias: nn.Parameter | None,
        like: Tensor,
        transposed: bool = False,
    ) -> None:
        super().__init__(packed, bias, like)
        self.transposed = transposed
        self._layout: Layout | None = None

    @property
    def weight(self) -> Any:
        """See :class:`PackedModule`."""
        if not self.transposed:
            return super().weight
        shape = torch.Size(reversed(self.shape))
        return LazyWeight(shape, self.like, lambda: self.rows(None, self.like.dtype).T)

    def prepare(self) -> Layout:
        """Lay the weight out for its device.

        Raises:
            ValueError: If ``BITPLAN_KERNEL`` asks for kernels that cannot run there.
        """
        self._layout = prepare(self.packed(), self.like.device)
        if isinstance(self._layout, PlaneLayout):  # not both in the memory of a GPU
            for name in self._names():
                self._buffers[name] = self.part(name).cpu()
        return self._layout

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., cols] to outputs [..., rows], in the dtype of ``x``."""
        layout = self._layout
        if layout is None:
            if torch.compiler.is_compiling():  # cannot be traced; the op behind this one can
                layout = StoredLayout(self.packed())
            else:
                layout = self.prepare()
        return layout.linear(x, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        before, stored = self.like.device, {name: self.part(name) for name in self._names()}
        super()._apply(fn, recurse)
        if self.like.device == before:  # a cast
            self._buffers.update(stored)
        elif self._layout is not None:
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._layout is not None:
            self.prepare()


class PackedEmbedding(PackedModule):
    """Stands for ``nn.Embedding``; only the rows that are looked up are dequantized."""

    @property
    def num_embeddings(self) -> int:
        """As in ``nn.Embedding``: the rows of the weight."""
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        """As in ``nn.Embedding``: the columns of the weight."""
        return self.shape[1]

    def forward(self, indices: Tensor) -> Tensor:
        """Row indices [...] to rows [..., cols]."""
        rows = self.rows(indices.reshape(-1), self.like.dtype)
        return rows.view(*indices.shape, self.shape[1])

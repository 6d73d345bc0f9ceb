"""Weights in parts: some rows in one format, some in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.layouts import Layout
from ..kernels.row_layouts import on_planes, prepare_rows, stored_rows
from ..quantizers.packed import PackedTensor
from .lazy import LazyWeight
from .packed_modules import LaidOut, PackedModule


class PackedRows(nn.Module):
    """A weight [rows, cols] in parts, each with some of its rows and a format of its own.

    Args:
        parts: The packed parts and the rows each of them has; together all rows, each once.
        like: Has the dtype of what is dequantized.
    """

    def __init__(self, parts: list[tuple[PackedTensor, Tensor]], like: Tensor) -> None:
        super().__init__()
        self.parts = nn.ModuleList(PackedModule(packed, None, like) for packed, _ in parts)
        together = torch.cat([rows for _, rows in parts])
        self.shape = (len(together), parts[0][0].shape[1])
        # Where every row is, when one part comes after the other.
        self.register_buffer("order", together.argsort().int(), persistent=False)

    @property
    def like(self) -> Tensor:
        """See :class:`PackedModule`."""
        return self.modules_of_parts()[0].like

    def modules_of_parts(self) -> list[PackedModule]:
        """The parts, one after the other."""
        return [cast(PackedModule, module) for module in self.parts]

    def packed(self) -> list[tuple[PackedTensor, Tensor]]:
        """The packed parts, and the rows that each of them has, int64."""
        modules = self.modules_of_parts()
        numbers = self.get_buffer("order").argsort().split([module.shape[0] for module in modules])
        return [(m.packed(), rows) for m, rows in zip(modules, numbers, strict=True)]

    def rows(self, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, or its rows with the given indices [n], as [n, cols]."""
        device, order = self.like.device, self.get_buffer("order")
        at = order if indices is None else order[indices.to(order.device)]
        result = torch.empty(len(at), self.shape[1], dtype=dtype, device=device)
        first = 0
        for module in self.modules_of_parts():
            chosen = ((at >= first) & (at < first + module.shape[0])).nonzero()[:, 0]
            if len(chosen):
                result[chosen.to(device)] = module.rows(at[chosen].long() - first, dtype)
            first += module.shape[0]
        return result

    def extra_repr(self) -> str:
        """The shape and formats, for ``print(model)``."""
        formats = ", ".join(f"{m.shape[0]} x {m.fmt}" for m in self.modules_of_parts())
        return f"{self.shape[0]}, {self.shape[1]}, rows={formats}"


class PackedRowsLinear(LaidOut, PackedRows):
    """Stands for a linear layer, as ``PackedLinear`` does, with a weight in parts.

    On a GPU all parts with codes are multiplied in one launch, whatever their widths.

    Args:
        parts: The packed parts and the rows each of them has; together all rows, each once.
        bias: Added to the outputs [rows].
        like: Has the dtype of outputs.
        transposed: Whether the module it stands for keeps its weight as [cols, rows].
    """

    def __init__(
        self,
        parts: list[tuple[PackedTensor, Tensor]],
        bias: nn.Parameter | None,
        like: Tensor,
        transposed: bool = False,
    ) -> None:
        super().__init__(parts, like)
        self.bias = bias
        self.transposed = transposed
        self._layout: Layout | None = None

    @property
    def weight(self) -> Any:
        """The weight for who reads it instead of calling the module; see ``PackedModule``."""
        like = self.like
        if self.transposed:
            shape = torch.Size(reversed(self.shape))
            return LazyWeight(shape, like, lambda: self.rows(None, like.dtype).T)
        whole, some = (lambda: self.rows(None, like.dtype)), (lambda i: self.rows(i, like.dtype))
        return LazyWeight(torch.Size(self.shape), like, whole, some)

    def prepare(self) -> Layout:
        """Lay the weight out for its device.

        Raises:
            ValueError: If ``BITPLAN_KERNEL`` asks for kernels that cannot run there.
        """
        self._layout = prepare_rows(self.packed(), self.like.device)
        for module in self.modules_of_parts():
            if on_planes(module.fmt, self.like.device):  # not both in the memory of a GPU
                for name in module.fmt.tensors(module.shape):
                    module._buffers[name] = module.part(name).cpu()
        return self._layout

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., cols] to outputs [..., rows], in the dtype of ``x``."""
        layout = self._layout
        if layout is None:  # tracing sees the ops behind it, but not through the laying out
            compiling = torch.compiler.is_compiling()
            layout = stored_rows(self.packed()) if compiling else self.prepare()
        return layout.linear(x, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedRowsLinear:
        before, stored = self.like.device, [packed.tensors for packed, _ in self.packed()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.like.device == before:  # a cast
            for module, tensors in zip(self.modules_of_parts(), stored, strict=True):
                module._buffers.update(tensors)
        elif self._layout is not None:
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._layout = None  # the parts come after

"""A weight that is dequantized when something is computed with it, and only as far as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LazyWeight:
    """Stands for a tensor in the code of a model: an attribute that costs nothing until it is used.

    Shape, dtype and device are known.  An index into the first dimension, and a look-up by
    ``torch.nn.functional.embedding``, give those entries alone; everything else, torch functions
    included, sees the whole tensor.

    Args:
        shape: Of the tensor.
        like: A tensor of its dtype and on its device.
        whole: Makes the tensor.
        some: Makes entries [n, ...] of its first dimension, by index [n]; None takes the whole.
    """

    def __init__(
        self,
        shape: torch.Size,
        like: Tensor,
        whole: Callable[[], Tensor],
        some: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = shape, like.dtype, like.device
        self.requires_grad = False
        self._whole, self._some = whole, some

    def __getitem__(self, index: Any) -> Tensor:
        """Entries of the first dimension, or what any other index gives of the whole."""
        if self._some is None:
            return self._whole()[index]
        if isinstance(index, slice):
            rows = torch.arange(self.shape[0], device=self.device)[index]
            return self._some(rows)
        if isinstance(index, int):
            if not -len(self) <= index < len(self):  # what ends a loop over the entries
                raise IndexError(f"There is no entry {index} among {len(self)}.")
            return self._some(torch.tensor([index % len(self)], device=self.device))[0]
        if (
            isinstance(index, Tensor)
            and not index.is_floating_point()
            and index.dtype != torch.bool
        ):
            rows, where = index.reshape(-1).unique(return_inverse=True)
            found = F.embedding(where, self._some(rows).flatten(1))
            return found.reshape(*index.shape, *self.shape[1:])
        return self._whole()[index]

    def __len__(self) -> int:
        """Entries of the first dimension."""
        return self.shape[0]

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    @property
    def ndim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    def numel(self) -> int:
        """As of a tensor."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return True

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor has."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._whole(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute with the tensor itself, or with the rows that an embedding looks up."""
        kwargs = dict(kwargs or {})
        if function is F.embedding:
            table = args[1] if len(args) > 1 else kwargs.get("weight")
            indices = args[0] if args else kwargs.get("input")
            plain = kwargs.get("max_norm") is None and len(args) < 4
            if isinstance(table, cls) and isinstance(indices, Tensor) and plain:
                return table[indices]
        return function(*_whole(args), **_whole(kwargs))


def _whole(value: Any) -> Any:
    """A structure of arguments with tensors in place of lazy ones."""
    if isinstance(value, LazyWeight):
        return value._whole()
    if isinstance(value, tuple | list):
        return type(value)(_whole(item) for item in value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: LazyWeight, *others: Any) -> Any:
        return getattr(self._whole(), name)(*_whole(others))

    return operate


for _name in ("add", "sub", "mul", "matmul", "truediv", "pow"):
    for _side in ("", "r"):
        setattr(LazyWeight, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
setattr(LazyWeight, "__neg__", _operator("__neg__"))  # noqa: B010

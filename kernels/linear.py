"""Modules that compute with packed weights, and putting them into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers.packed import PackedTensor
from .launch import PackedMeta, dequantize
from .layouts import Layout, PlaneLayout, StoredLayout, prepare


class PackedModule(nn.Module):
    """A module whose weight [rows, cols] is kept as the stored parts of a ``PackedTensor``.

    The parts are buffers under their own names (``codes``, ``scale``, ``zero``, or ``weight``
    for a float format), so the ``state_dict`` has the names of a checkpoint.  Moving the module
    to a device moves them; casting it to another dtype changes activations and bias only.
    """

    codes: Tensor
    scale: Tensor
    weight: Tensor
    like: Tensor
    bias: nn.Parameter | None

    def __init__(self, packed: PackedTensor, bias: nn.Parameter | None, like: Tensor) -> None:
        super().__init__()
        self.fmt = packed.fmt
        self.shape = packed.shape
        self.meta = PackedMeta.of(self.fmt, self.shape) if self.fmt.integer else None
        for name, part in packed.tensors.items():
            self.register_buffer(name, part)
        self.bias = bias
        # An empty tensor that follows casts and moves: the dtype of an output that has no float
        # input, and the device of the module even where its parts stay in main memory.
        device = next(iter(packed.tensors.values())).device
        empty = torch.empty(0, dtype=like.dtype, device=device)
        self.register_buffer("like", empty, persistent=False)

    def packed(self) -> PackedTensor:
        """The packed weight; its tensors are this module's buffers."""
        names = self.fmt.tensors(self.shape)
        return PackedTensor(self.fmt, self.shape, {name: self.get_buffer(name) for name in names})

    def rows(self, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, or its rows with the given indices [n], as [n, cols]."""
        if self.meta is None:  # its family decodes it
            return self.packed().dequantize(indices, dtype)
        zero = self._buffers.get("zero")
        rows: Tensor = dequantize(self.codes, self.scale, zero, indices, *self.meta)
        return rows.to(dtype)

    def extra_repr(self) -> str:
        """The format and shape, for ``print(model)``."""
        return f"{self.shape[0]}, {self.shape[1]}, format={self.fmt}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        stored = dict(self.packed().tensors)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in stored.items():
            moved = self.get_buffer(name)
            if moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        return self


class PackedLinear(PackedModule):
    """Stands for ``nn.Linear`` and for the ``Conv1D`` of transformers.

    What the kernels of its device need is made at the first call, or by :meth:`prepare`, and made
    again after the module was moved or other parts were loaded.
    """

    def __init__(self, packed: PackedTensor, bias: nn.Parameter | None, like: Tensor) -> None:
        super().__init__(packed, bias, like)
        self._layout: Layout | None = None

    def prepare(self) -> Layout:
        """Lay the weight out for its device.

        Raises:
            ValueError: If ``BITPLAN_KERNEL`` asks for kernels that cannot run there.
        """
        self._layout = prepare(self.packed(), self.like.device)
        if isinstance(self._layout, PlaneLayout):  # not both in the memory of a GPU
            for name, part in self.packed().tensors.items():
                self._buffers[name] = part.cpu()
        return self._layout

    @property
    def in_features(self) -> int:
        """As in ``nn.Linear``: the columns of the weight."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """As in ``nn.Linear``: the rows of the weight."""
        return self.shape[0]

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
        before, stored = self.like.device, dict(self.packed().tensors)
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

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the layout: pointers mean nothing in a copy."""
        return self.__dict__ | {"_layout": None}


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


class PackedConv2d(PackedModule):
    """Stands for ``nn.Conv2d`` with zero padding; the weight is [out, in * height * width]."""

    def __init__(self, packed: PackedTensor, bias: nn.Parameter | None, module: nn.Conv2d) -> None:
        super().__init__(packed, bias, module.weight)
        self.kernel_shape = tuple(module.weight.shape)
        self.stride = module.stride
        self.padding = module.padding
        self.dilation = module.dilation
        self.groups = module.groups

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, in, height, width] to [batch, out, height, width]."""
        kernel = self.rows(None, x.dtype).view(self.kernel_shape)
        return nn.functional.conv2d(
            x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


def replace(
    model: nn.Module, packed: Mapping[str, PackedTensor], aliases: Mapping[str, str]
) -> None:
    """Put packed weights into a model, in place; all or nothing.

    Biases stay the parameters they were.  The weights of ``model`` may be on the meta device,
    so a packed model can be built without ever allocating the original one.

    Args:
        model: The model.
        packed: Packed weights by module name.
        aliases: Modules tied to a packed one: their name -> its name.  Both get the same
            tensors (a later move to another device gives each its own copy).

    Raises:
        ValueError: If a module is missing, has another shape, computes something that packed
            modules do not, or is tied to a module that is neither packed nor an alias.  The
            message names the first such module, and the model is unchanged.
    """
    sources = {name: name for name in packed} | dict(aliases)
    modules = dict(model.named_modules(remove_duplicate=False))
    replacements = {}
    for name, source in sources.items():
        if source not in packed:
            raise ValueError(
                f"Module {name!r} is tied to {source!r}, for which there is no packed weight."
            )
        if name not in modules:
            raise ValueError(
                f"The model has no module {name!r}. The packed weights belong to another model."
            )
        replacements[name] = _packed_module(name, modules[name], packed[source])
    owners = {id(modules[name].weight): name for name in sources}
    for name, module in modules.items():
        owner = owners.get(id(getattr(module, "weight", None)))
        if owner is not None and name not in sources:
            raise ValueError(
                f"Module {name!r} is tied to {owner!r}, which gets a packed weight. "
                f"Name it in aliases, or leave {owner!r} out."
            )
    for name, replacement in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a packed model compute in a dtype, in place.

    Parameters and the outputs of packed embeddings get it; packed parts keep theirs, and so do
    other buffers, such as the frequencies of rotary embeddings, which 16 bits would spoil.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.like = module.like.to(dtype)


def _packed_module(name: str, module: nn.Module, packed: PackedTensor) -> nn.Module:
    """What stands for ``module`` with the weight ``packed``."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    replacement: nn.Module
    if type(module) is nn.Linear:
        _check_shape(name, weight, packed)
        replacement = PackedLinear(packed, bias, weight)
    elif kind == "transformers.pytorch_utils.Conv1D":
        _check_shape(name, weight.T, packed)
        replacement = PackedLinear(packed, bias, weight)
    elif type(module) is nn.Embedding and module.max_norm is None:
        _check_shape(name, weight, packed)
        replacement = PackedEmbedding(packed, None, weight)
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
        _check_shape(name, weight.flatten(1), packed)
        replacement = PackedConv2d(packed, bias, module)
    else:
        raise ValueError(
            f"Module {name!r} ({module}) cannot hold a packed weight. Packed modules stand for "
            "nn.Linear, Conv1D, nn.Embedding without max_norm and nn.Conv2d with zero padding, "
            "but not for their subclasses. Leave it out of the plan."
        )
    return replacement.train(module.training)


def _check_shape(name: str, weight: Tensor, packed: PackedTensor) -> None:
    if packed.shape != tuple(weight.shape):
        raise ValueError(
            f"The packed weight of {name!r} is {list(packed.shape)}, but the model needs "
            f"{list(weight.shape)}. The packed weights belong to another model."
        )

"""Putting packed weights into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers.packed import PackedTensor
from .lazy import LazyWeight
from .packed_modules import PackedModule
from .packed_rows import PackedRows
from .sites import SITES, Place, entries_of, places
from .substitute import substitute
from .units import Ranges, check_row_sets, matrix_name, row_count

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_Parts = list[tuple[PackedTensor, Ranges | None]]


def replace(
    model: nn.Module,
    packed: Mapping[str, PackedTensor],
    aliases: Mapping[str, str],
    rows: Mapping[str, Ranges] | None = None,
) -> None:
    """Put packed weights into a model, in place; all or nothing.

    Plain linear layers and embeddings become modules that compute with the packed weight (of an
    embedding in parts, rows are dequantized when they are looked up).  Every
    other module stays what it is: whoever reads its parameter, itself or its parent, reads the
    dequantized weight.  Biases stay the parameters they were.  The weights of ``model`` may be on
    the meta device, so a packed model can be built without ever allocating the original one.

    Args:
        model: The model.
        packed: Packed weights by part: the name of a matrix, or ``matrix[rows:k]``.
        aliases: Matrices tied to a packed one: their name -> its name.  Both get the same
            tensors (a later move to another device gives each its own copy).
        rows: The rows of the parts that are not whole matrices.

    Raises:
        ValueError: If a weight is missing, has another shape, or is tied to one that is neither
            packed nor an alias.  The message names the first such weight, and the model is
            unchanged.
    """
    matrices: dict[str, _Parts] = {}
    for name, tensor in packed.items():
        some = (rows or {}).get(name)
        matrices.setdefault(matrix_name(name), []).append((tensor, some))
    sources = {name: name for name in matrices} | dict(aliases)
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {place.name: place for place in places(model)}
    for name, source in sources.items():
        if source not in matrices:
            raise ValueError(
                f"{name!r} is tied to {source!r}, for which there is no packed weight."
            )
        if name not in found:
            what = f"{name!r} ({modules[name]})" if name in modules else f"{name!r}"
            held = "cannot hold a packed weight" if name in modules else "is not in the model"
            raise ValueError(f"{what} {held}. The packed weights belong to another model.")
        _check_shape(name, found[name].shape, matrices[source])
    owners = {id(found[name].parameter): name for name in sources}
    for name, place in found.items():
        owner = owners.get(id(place.parameter))
        if owner is not None and name not in sources:
            raise ValueError(
                f"{name!r} is tied to {owner!r}, which gets a packed weight. "
                f"Name it in aliases, or leave {owner!r} out."
            )
    for name, source in sources.items():
        _put(model, found[name], matrices[source])


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


def _put(model: nn.Module, place: Place, parts: _Parts) -> None:
    module = place.module
    whole = len(parts) == 1 and parts[0][1] is None
    some_rows = [] if whole else [(tensor, _indices(some)) for tensor, some in parts]
    if place.site.kernels(module) and place.path:
        replacement = (
            place.site.packed(module, parts[0][0])
            if whole
            else place.site.packed_rows(module, some_rows)
        )
        if replacement is not None:
            for hooks in _HOOKS:  # whoever watches or changes what goes in and out still does
                getattr(replacement, hooks).update(getattr(module, hooks))
            parent, _, child = place.path.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement.train(module.training))
            return
    if place.attribute not in module._parameters:  # a module under two names
        return
    parameter = place.parameter
    holder: nn.Module
    if whole:
        holder = PackedModule(parts[0][0], None, parameter)
    else:
        holder = PackedRows(some_rows, parameter)
    del module._parameters[place.attribute]
    module._modules[place.attribute] = holder
    substitute(place, _Read(place.site_name, place.attribute, parameter.shape), packed=True)
    place.site.forget(module)


@dataclass(frozen=True, slots=True)
class _Read:
    """What is read in place of a packed parameter."""

    site_name: str
    attribute: str
    shape: torch.Size

    def __call__(self, module: nn.Module) -> Any:
        holder: Any = module._modules[self.attribute]
        site, dtype = SITES.get(self.site_name), holder.like.dtype

        def whole() -> Tensor:
            return site.restored(module, self.attribute, holder.rows(None, dtype), self.shape)

        def some(entries: Tensor) -> Tensor:
            return entries_of(
                site,
                module,
                self.attribute,
                self.shape,
                entries,
                lambda rows: holder.rows(rows, dtype),
            )

        return LazyWeight(self.shape, holder.like, whole, some) if site.by_index else whole()


def _indices(rows: Ranges | None) -> Tensor:
    assert rows is not None
    return torch.cat([torch.arange(start, stop) for start, stop in rows])


def _check_shape(name: str, shape: tuple[int, int], parts: _Parts) -> None:
    found = [tensor.shape for tensor, _ in parts]
    total = (sum(rows for rows, _ in found), found[0][1])
    row_sets = [some for _, some in parts if some is not None]
    if row_sets:
        check_row_sets(name, shape[0], row_sets)
    counts = [row_count(some) for some in row_sets]
    fit = counts == [rows for rows, _ in found] if row_sets else len(parts) == 1
    if total != shape or not fit or any(cols != shape[1] for _, cols in found):
        raise ValueError(
            f"The packed weight of {name!r} is {list(total)}, but the model needs "
            f"{list(shape)}. The packed weights belong to another model."
        )

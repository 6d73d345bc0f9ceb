"""A model whose weights stay in its checkpoint's files: each is made float32 when it is read.

The parameters are memory maps in the checkpoint's dtype.  Whoever reads one, its module or another,
gets it in float32, made for that read and forgotten after it; a backward pass makes it again.  What
lies under :func:`held` is made once and kept until the end, such as a block that many batches run
through.  Weights that the checkpoint has in float32 are the maps themselves.

The parameters are for reading: what is written to one is lost when its pages are let go of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .lazy import LazyWeight
from .mapped import is_mapped, release
from .sites import Place, places
from .substitute import Read, substitute

_STREAMED = "_bitplan_streamed"
_ORIGIN = "_bitplan_origin"  # of a copy: the parameter


@dataclass(slots=True)
class _Now:
    """What is in force.

    Attributes:
        holding: Addresses of the parameters to be held.
        held: Address of a parameter -> it in float32.
        packing: Depth of :func:`packing`.
        saving: Depth of that and of :func:`read_again`.
        last: The last copy that was made for a graph, which is alive until it has been saved there.
    """

    holding: frozenset[int] = frozenset()
    held: dict[int, Tensor] = field(default_factory=dict)
    packing: int = 0
    saving: int = 0
    last: Tensor | None = None


_now = _Now()
_lock = RLock()
_made: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # address of a copy -> it


def stream_weights(module: nn.Module) -> None:
    """Let the mapped weights of a module be read in float32; all else of it becomes float32.

    Raises:
        ValueError: If torch cannot give gradients of float32 to weights of 16 bits.
    """
    found = [place for place in places(module) if is_mapped(place.parameter)]
    if not hasattr(nn.Parameter, "grad_dtype"):
        raise ValueError("torch 2.10 or later is needed to compute gradients of weights in a file")
    streamed = {id(place.parameter) for place in found}
    for parameter in module.parameters():
        if id(parameter) not in streamed:
            data = parameter.data
            changed = data.float() if data.is_floating_point() else data
            parameter.data = changed.clone() if is_mapped(changed) else changed
            release(data)
    for place in found:
        place.parameter.grad_dtype = torch.float32
        substitute(place, _reader(place))
    setattr(module, _STREAMED, True)


def is_streamed(module: nn.Module) -> bool:
    """Whether a module's weights stay in its files."""
    return bool(getattr(module, _STREAMED, False))


def float32_of(parameter: Tensor) -> Tensor:
    """A parameter in float32: itself, what is held of it, or a copy whose pages are let go of."""
    parameter = parameter.detach()
    if parameter.dtype == torch.float32:
        return parameter
    address = parameter.untyped_storage().data_ptr()
    with _lock:
        known = _made.get(_held_address(address))
        if known is not None:
            return known
    copy = parameter.float()
    release(parameter)
    with _lock:
        setattr(copy, _ORIGIN, parameter)
        _made[copy.untyped_storage().data_ptr()] = copy
        if torch.is_grad_enabled() and _now.saving:
            _now.last = copy
        if address in _now.holding:
            _now.held[address] = copy
    return copy


@contextmanager
def held(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keep these parameters in float32 from when they are first read until the end."""
    before = _now.held, _now.holding
    _now.held = {}
    _now.holding = frozenset(p.untyped_storage().data_ptr() for p in parameters)
    try:
        yield
    finally:
        _now.held, _now.holding = before
        for parameter in parameters:
            release(parameter)


@contextmanager
def read_again(module: nn.Module) -> Iterator[None]:
    """Let a backward pass make streamed weights again, instead of keeping them from the forward.

    Within :func:`packing`, whose hooks ask :func:`pack` themselves, nothing is added.
    """
    if _now.packing or not is_streamed(module):
        yield
        return
    with _saving(pack, unpack):
        yield


@contextmanager
def packing(pack_by: Callable[[Tensor], Any], unpack_by: Callable[[Any], Tensor]) -> Iterator[None]:
    """``saved_tensors_hooks`` which :func:`read_again` leaves in force."""
    _now.packing += 1
    try:
        with _saving(pack_by, unpack_by):
            yield
    finally:
        _now.packing -= 1


@contextmanager
def _saving(pack_by: Callable[[Tensor], Any], unpack_by: Callable[[Any], Tensor]) -> Iterator[None]:
    """``saved_tensors_hooks`` under which the last weight made is known, and no longer."""
    _now.saving += 1
    try:
        with saved_tensors_hooks(pack_by, unpack_by):
            yield
    finally:
        _now.saving -= 1
        _now.last = None


class _Saved(NamedTuple):
    """How a saved tensor looks at a parameter made float32."""

    parameter: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def pack(tensor: Tensor) -> Tensor | _Saved:
    """What to save of a tensor: of a weight that can be made again, which it is."""
    if tensor.layout != torch.strided:
        return tensor
    address = tensor.untyped_storage().data_ptr()
    with _lock:
        copy = _made.get(address)
    if copy is None:
        return tensor
    origin: Tensor = getattr(copy, _ORIGIN)
    return _Saved(origin, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def unpack(saved: Tensor | _Saved) -> Tensor:
    """Invert :func:`pack`."""
    if isinstance(saved, Tensor):
        return saved
    return float32_of(saved.parameter).as_strided(saved.size, saved.stride, saved.offset)


def _held_address(address: int) -> int:
    copy = _now.held.get(address)
    return -1 if copy is None else copy.untyped_storage().data_ptr()


def _reader(place: Place) -> Read:
    """What gives a mapped parameter in float32."""

    def read(module: nn.Module) -> Any:
        parameter: Any = module._parameters[place.attribute]
        if torch.is_grad_enabled() and parameter.requires_grad:
            standing_in: Any = InPlaceOf.apply
            return standing_in(parameter, float32_of(parameter))
        if place.site.by_index:
            like = torch.empty(0, device=parameter.device)
            whole, some = partial(float32_of, parameter), partial(_some, parameter)
            return LazyWeight(parameter.shape, like, whole, some)
        return float32_of(parameter)

    return read


def _some(parameter: Tensor, entries: Tensor) -> Tensor:
    """Some leading entries of a parameter in float32."""
    if float32_is_held(parameter):
        return float32_of(parameter)[entries]
    return parameter.detach()[entries].float()


def float32_is_held(parameter: Tensor) -> bool:
    """Whether :func:`float32_of` has it."""
    return _held_address(parameter.untyped_storage().data_ptr()) in _made


class InPlaceOf(torch.autograd.Function):
    """A weight whose gradient is that of the parameter it stands for."""

    @staticmethod
    def forward(_ctx: Any, _parameter: Tensor, weight: Tensor) -> Tensor:
        """The weight."""
        return weight.view_as(weight)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient as it is."""
        return gradients[0], None

"""Reading something else in place of a parameter, whoever reads it: the module, or its parent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn

from .sites import SITES, Place

Read = Callable[[nn.Module], Any]  # what stands for a parameter, from the module that has it

_READS = "_bitplan_reads"
_KEYS = "_bitplan_keys"


def substitute(place: Place, read: Read, packed: bool = False) -> None:
    """Let whoever reads ``module.attribute`` get ``read(module)``, until :func:`restore`.

    Of several for one parameter the last counts.

    The module's class becomes a subclass of it with a property in the parameter's name; what the
    module is to ``isinstance`` and to its parents stays the same.

    Args:
        place: The parameter.
        read: Called at every access.
        packed: Whether the parameter is gone for good.
    """
    module = place.module
    reads = dict(module.__dict__.get(_READS, {}))
    reads[place.attribute] = (*reads.get(place.attribute, ()), read)
    keys = (*module.__dict__.get(_KEYS, ()), (place.attribute, place.site_name, packed))
    _become(module, original_class(module), reads, keys)


def restore(place: Place) -> None:
    """Undo the last :func:`substitute`; nothing happens where there is nothing to undo."""
    module = place.module
    reads, keys = dict(module.__dict__.get(_READS, {})), list(module.__dict__.get(_KEYS, ()))
    if left := reads.pop(place.attribute, ())[:-1]:
        reads[place.attribute] = left
    for i in reversed(range(len(keys))):
        if keys[i][0] == place.attribute:
            del keys[i]
            break
    _become(module, original_class(module), reads, tuple(keys))


@contextmanager
def substituted(reads: Sequence[tuple[Place, Read]]) -> Iterator[None]:
    """:func:`substitute` for the time of a block."""
    done: list[Place] = []
    try:
        for place, read in reads:
            substitute(place, read)
            done.append(place)
        yield
    finally:
        for place in reversed(done):
            restore(place)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without what :func:`substitute` made of it."""
    kind: type[nn.Module] = getattr(type(module), "_bitplan_original", type(module))
    return kind


def _become(module: nn.Module, kind: Any, reads: dict[str, tuple[Read, ...]], keys: Any) -> None:
    if reads:
        module.__dict__[_READS], module.__dict__[_KEYS] = reads, keys
        object.__setattr__(module, "__class__", kind)  # for the sites to look at
        object.__setattr__(module, "__class__", _subclass(kind, keys))
    else:
        module.__dict__.pop(_READS, None)
        module.__dict__.pop(_KEYS, None)
        object.__setattr__(module, "__class__", kind)


@cache
def _subclass(kind: Any, keys: tuple[tuple[str, str, bool], ...]) -> type[nn.Module]:
    """The subclass in which some parameters are properties: one per class and parameters."""
    namespace: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
        "_bitplan_original": kind,
    }
    for attribute, site, packed in keys:
        namespace |= SITES.get(site).methods(kind, packed)
        namespace[attribute] = property(_getter(attribute))
    made: type[nn.Module] = type(kind)(kind.__name__, (kind,), namespace)
    return made


def _getter(attribute: str) -> Callable[[nn.Module], Any]:
    def get(self: nn.Module) -> Any:
        try:
            return self.__dict__[_READS][attribute][-1](self)
        except AttributeError as error:  # modules would answer with what the parameter was
            raise RuntimeError(
                f"What stands for {attribute!r} of a {type(self).__name__} failed: {error}"
            ) from error

    return get


def _reduce(self: nn.Module, _protocol: Any) -> Any:
    """Copy and pickle: the class is made again from the one it stands for."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _rebuild, (original_class(self), self.__dict__[_KEYS]), state


def _rebuild(kind: Any, keys: tuple[tuple[str, str, bool], ...]) -> nn.Module:
    subclass = _subclass(kind, keys)
    module: nn.Module = subclass.__new__(subclass)
    return module

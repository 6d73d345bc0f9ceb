"""A device that is another one than the CPU wherever that matters, and needs no hardware.

Tensors on it are held in the memory of the CPU and computed there, but say that they are on
``pretended:0``, and what a GPU refuses raises here, too: operations on tensors of two devices,
``numpy()`` of a tensor that is elsewhere, random numbers from the generator of another device.
Autograd, views, modules and threads work as on any device.  So a whole job can be run with
``--device pretended`` to find out whether it would run on a GPU.

Modules that share a parameter no longer do after ``.to``, unlike on a GPU.
The test process keeps the device once :func:`register` was called.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
MEMORY = 1 << 32  # bytes
ELSEWHERE = 1 << 62  # added to addresses
# Tensors of two devices may come together in these.
_COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Pretended(Tensor):
    """A tensor on the device.

    Attributes:
        held: The same numbers on the CPU.
    """

    held: Tensor
    # What was asked of the device: operations, and those that a GPU would have to be awaited for.
    asked: ClassVar[Counter[str]] = Counter()
    awaited: ClassVar[Counter[str]] = Counter()

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        """The tensor of numbers on the CPU."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute on the CPU, if the device could."""
        return _computed(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as by CUDA."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as by CUDA."""
        return self.numpy()

    def tolist(self) -> Any:
        """A copy is made, as from any device."""
        Pretended.awaited["tolist"] += 1
        return self.held.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        """Made on the CPU and sent over."""
        return torch.tensor(data, **{"dtype": self.dtype, **options}).to(self.device)

    def untyped_storage(self) -> Any:
        """That of the numbers: its address tells whether two tensors share memory."""
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        """An address that tells tensors apart, and that nothing on the CPU can read."""
        return self.held.data_ptr() + ELSEWHERE

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        """The numbers and the device."""
        return f"{self.held!r} on {NAME}"


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [t for t in tensors if isinstance(t, Pretended)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    if here and name not in _COPIES:
        _check(name, args, tensors)
    generator = kwargs.get("generator")
    if generator is not None and (here or target == NAME):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")
    Pretended.asked[name] += 1
    if name in {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2"} or (
        here and target == "cpu"
    ):
        Pretended.awaited[name] += 1
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if name == "_to_copy" and target == "cpu":
        # a copy, also where the numbers are there already
        return out.clone() if any(out is t.held for t in here) else out
    if name in {"copy_", "_copy_from"} and not isinstance(
        args[0 if name == "copy_" else 1], Pretended
    ):
        return args[0]
    changed = [
        kwargs[a.name] if a.name in kwargs else args[i]
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None
        and a.alias_info.is_write
        and (a.name in kwargs or i < len(args))
    ]
    if changed and len(func._schema.returns):
        if len(func._schema.returns) == 1 and len(changed) == 1:
            return changed[0]
        return tuple(changed)
    return tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, out)


def _check(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raise if a tensor with dimensions is elsewhere."""
    elsewhere = [t for t in tensors if not isinstance(t, Pretended) and t.dim() > 0]
    if name in _INDEXED:  # indices may be on the CPU, if what is indexed is not
        indices = [t for t in args[1] if t is not None]
        if not isinstance(args[0], Pretended):
            elsewhere = [args[0]]
        else:
            elsewhere = [t for t in elsewhere if all(t is not i for i in indices)]
    if elsewhere:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got one of shape "
            f"{list(elsewhere[0].shape)} on {elsewhere[0].device} and others on {NAME}:0."
        )


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


class _Module:
    """What torch asks a device module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return SimpleNamespace(name=NAME, total_memory=MEMORY)

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        return None

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_LIBRARIES: list[Any] = []


@cache
def register() -> torch.device:
    """Make the device known to torch."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Module())

    def fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
        return _computed(op, args, kwargs)

    library = torch.library.Library("_", "IMPL")
    library.fallback(fallback, "PrivateUse1")
    # While ``torch.tensor`` sends over what it made, subclasses are not asked, nor is a fallback.
    copying = torch.library.Library("aten", "IMPL")
    copying.impl(
        "copy_", lambda *args: _computed(torch.ops.aten.copy_.default, args, {}), "PrivateUse1"
    )
    _LIBRARIES.extend((library, copying))
    return torch.device(NAME, 0)

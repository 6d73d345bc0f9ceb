"""States at the borders between blocks: in memory up to a limit, and beyond it in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .._base.tensors import bytes_of
from .mapped import spill_folder

LIMIT = 1 << 26  # bytes in memory


class Borders:
    """What blocks hand on, by a key such as border and batch.

    A state is a tensor, or a tuple that starts with one and holds no other.

    Args:
        limit: Most bytes in memory; what is put when there are so many goes to a temporary file
            without a name.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._bytes = limit, 0
        self._memory: dict[Hashable, Tensor] = {}
        self._slots: dict[Hashable, tuple[int, torch.Size, torch.dtype, torch.device]] = {}
        self._rest: dict[Hashable, tuple[Any, ...]] = {}
        self._gone: set[Hashable] = set()
        self._file: Any = None
        self._end = 0

    def put(self, key: Hashable, state: Any) -> None:
        """Keep a state, in place of what was there."""
        hidden, rest = split_state(state)
        self._rest.pop(key, None)
        self._gone.discard(key)
        if rest is not None:
            self._rest[key] = rest
        self._bytes -= self._memory.pop(key, hidden[:0]).nbytes
        if self._bytes + hidden.nbytes <= self._limit:
            self._memory[key] = hidden.detach().clone()
            self._bytes += hidden.nbytes
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=spill_folder())  # noqa: SIM115
        kind = hidden.shape, hidden.dtype, hidden.device
        begin, shape, dtype, _ = self._slots.get(key, (self._end, *kind))
        if (shape, dtype) != (hidden.shape, hidden.dtype) or begin == self._end:
            begin, self._end = self._end, self._end + hidden.nbytes
        self._slots[key] = begin, *kind
        self._file.seek(begin)
        self._file.write(bytes_of(hidden))

    def get(self, key: Hashable) -> tuple[Tensor, Any]:
        """The tensor of a state, a copy, and what makes the state of such a tensor again."""
        hidden = self._memory[key].clone() if key in self._memory else self._read(key)
        return hidden, self._rest.get(key)

    def _read(self, key: Hashable) -> Tensor:
        begin, shape, dtype, device = self._slots[key]
        found = torch.empty(shape, dtype=dtype)
        self._file.seek(begin)
        if self._file.readinto(bytes_of(found)) != found.nbytes:
            raise OSError("The temporary file of states between blocks was cut short.")
        return found.to(device)

    def drop(self, key: Hashable) -> None:
        """Forget a state; its place in the file is that of the next one of the key."""
        self._bytes -= self._memory.pop(key, torch.empty(0)).nbytes
        self._rest.pop(key, None)
        self._gone.add(key)

    def __contains__(self, key: Hashable) -> bool:
        """Whether there is a state of a key."""
        return key not in self._gone and (key in self._memory or key in self._slots)


def split_state(state: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The tensor of a state, and the rest of its tuple; None if it is none.

    Raises:
        ValueError: If it holds anything else.
    """
    if isinstance(state, Tensor):
        return state, None
    tensors = isinstance(state, tuple) and [isinstance(part, Tensor) for part in state]
    if not tensors or not tensors[0] or any(tensors[1:]):
        raise ValueError("a block hands on more than one tensor")
    return state[0], state[1:]


def joined_state(hidden: Tensor, rest: tuple[Any, ...] | None) -> Any:
    """Invert :func:`split_state`."""
    return hidden if rest is None else (hidden, *rest)

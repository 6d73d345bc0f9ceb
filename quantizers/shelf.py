"""A shelf of packed tensors: in memory while there is room, in files beyond or for good."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._base.files import atomic_path
from .format import Format
from .packed import PackedTensor

# Bytes of packed tensors at hand at a time: a plan's are used again soon, those of all formats not.
MEMORY = 1 << 27


class Shelf:
    """Packed tensors by key.

    Args:
        folder: Where every one is kept as a file of its own, for later runs, too; files are read
            by mapping them. Without one, or one that cannot be written, what is new stays in memory
            and, beyond ``memory`` bytes, in a temporary folder that goes with the shelf.
        memory: Most bytes of packed tensors to have at hand at a time.
    """

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        self._folder, self.memory, self._bytes = folder, memory, 0
        self._writes = folder is not None and (not folder.exists() or os.access(folder, os.W_OK))
        self._temporary: TemporaryDirectory[str] | None = None
        self._at_hand: OrderedDict[str, PackedTensor] = OrderedDict()
        self._lock = RLock()

    def put(self, key: str, packed: PackedTensor) -> None:
        """Keep a packed tensor."""
        with self._lock:
            if self._folder is not None and self._writes:
                _write(_path(self._folder, key), packed)
            self._hold(key, packed)

    def get(self, key: str, device: torch.device) -> PackedTensor | None:
        """The packed tensor of a key, for a device; None if it is not there or damaged."""
        with self._lock:
            packed = self._at_hand.get(key)
            if packed is not None:
                self._at_hand.move_to_end(key)
                return packed
            roots = [self._folder, Path(self._temporary.name) if self._temporary else None]
            for root in filter(None, roots):
                packed = _read(_path(root, key), device)
                if packed is not None:
                    self._hold(key, packed)
                    return packed
            return None

    def _hold(self, key: str, packed: PackedTensor) -> None:
        if key in self._at_hand:
            return
        self._at_hand[key] = packed
        self._bytes += packed.nbytes
        while self._bytes > self.memory:
            old, dropped = self._at_hand.popitem(last=False)
            self._bytes -= dropped.nbytes
            if not self._writes:
                self._temporary = self._temporary or TemporaryDirectory(prefix="bitplan-")
                path = _path(Path(self._temporary.name), old)
                if not path.exists():
                    _write(path, dropped)


def _path(root: Path, key: str) -> Path:
    return root / key[:2] / f"{key}.safetensors"  # no folder with a hundred thousand files


def _write(path: Path, packed: PackedTensor) -> None:
    about = {"format": packed.fmt.name, "shape": "x".join(map(str, packed.shape))}
    parts = {name: part.contiguous() for name, part in packed.tensors.items()}
    with atomic_path(path) as temporary:
        save_file(parts, temporary, about)


def _read(path: Path, device: torch.device) -> PackedTensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            names = list(file.keys())
            parts = {name: file.get_tensor(name).to(device) for name in names}
        rows, cols = map(int, about["shape"].split("x"))
        return PackedTensor(Format.parse(about["format"]), (rows, cols), parts)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None

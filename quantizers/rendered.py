"""Dequantized matrices that are kept on a device with room for them, the last used ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from .packed import PackedTensor

SHARE = 10  # of the memory of a device, one part in so many
SINGLE = 64  # of that, the most for one matrix


class Rendered:
    """Whole matrices as formats make them, by matrix and format.

    To dequantize takes a dozen operations, which on a GPU cost as much for one row as for all, and
    the same matrices are asked for again with every batch.  On a CPU nothing is kept.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[PackedTensor | None, Tensor]] = OrderedDict()
        self._bytes = 0

    def get(
        self,
        key: tuple[str, str],
        given: PackedTensor | None,
        like: Tensor,
        make: Callable[[], Tensor],
    ) -> Tensor | None:
        """The matrix of a key, made if it is not there; None where there is no room for it.

        Args:
            key: Name and format.
            given: The packed matrix, if it is not the one that the rounding method makes.
            like: The original [rows, cols], float32.
            make: Makes the matrix.
        """
        room = room_on(like.device)
        if 4 * like.numel() > room // SINGLE:
            return None
        kept = self._kept.get(key)
        if kept is not None and kept[0] is given:
            self._kept.move_to_end(key)
            return kept[1]
        matrix = make()
        if kept is not None:
            self._bytes -= kept[1].nbytes
        self._kept[key] = given, matrix
        self._bytes += matrix.nbytes
        while self._bytes > room:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
        return matrix


def room_on(device: torch.device) -> int:
    """Bytes of a device that may be taken by what could be made again; 0 of a CPU's."""
    if device.type == "cpu":
        return 0
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    return 0 if properties is None else int(properties(device).total_memory) // SHARE

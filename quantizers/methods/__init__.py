"""Rounding methods: how a weight becomes packed codes of a format, one file per method.

A method says of itself, as traits of its registration:

``grid``
    ``(weight, fmt) -> Fitted | None`` if its codes are the nearest ones on a grid: whoever keeps
    the grid can make the codes again at any time.
``needs``
    Names of the fields of :class:`Evidence` that it works from; without any it needs no data.
``rounds``
    ``(fmt) -> bool``, the formats it has codes of its own for; all others are rounded to nearest.
``compiled``
    Whether it runs in loops compiled for the CPU: where they are, weights on other devices are
    rounded there, too, rather than by thousands of small operations each.
``revision``
    A whole number, raised when its codes change: codes kept by an earlier one are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._base.registry import Registry
from ..format import Format
from ..packed import PackedTensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a method may know of a weight [rows, cols] besides its entries.

    Attributes:
        hessian: Second moment of the inputs that multiply the weight, the mean of x x^T, float32
            [cols, cols]; or [parts, cols, cols] if the rows are so many equal blocks with inputs
            of their own, as in grouped convolutions and fused experts. None where nothing
            multiplies it (a lookup table), or nothing reached it.
        fisher: What an error in one row costs, mean over the rows, shaped like ``hessian``: errors
            E cost about ``sum_r rows_r E_r fisher E_r^T / 2`` nats per token.
        rows: What an error in a row costs relative to the mean row, float32 [rows].
        damping: What is best added to the diagonal of ``fisher``, as a multiple of its mean, as far
            as sequences tell that it was not made from; None where nothing does.
        kept: What methods derived from the other fields, by name. Matrices with the same inputs
            share one evidence, and all formats of a matrix do.
    """

    hessian: Tensor | None = None
    fisher: Tensor | None = None
    rows: Tensor | None = None
    damping: float | None = None
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Evidence:
        """The same on a device: itself if it is there, otherwise with nothing derived yet."""
        parts = (self.hessian, self.fisher, self.rows)
        if all(part is None or part.device == device for part in parts):
            return self
        hessian, fisher, rows = (None if part is None else part.to(device) for part in parts)
        return Evidence(hessian, fisher, rows, self.damping)


Method = Callable[[Tensor, Format, Evidence], PackedTensor]
METHODS: Registry[Method] = Registry("method", __name__)


def rounding_device(rounding: str, device: torch.device) -> torch.device:
    """Where a method rounds weights that are on a device; a warning if that takes long."""
    if device.type == "cpu" or not METHODS.trait(rounding, "compiled", False):
        return device
    from ..native_rounding import LIBRARY, warn

    loaded, reason = LIBRARY.find()
    if loaded is None:
        warn(reason)
        return device
    return torch.device("cpu")

"""Rounding methods: how the grid of a format is fitted to a weight, one file per method."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..._base.registry import Registry
from ..format import Fitted, Format

METHODS: Registry[Callable[[Tensor, Format], Fitted | None]] = Registry("method", __name__)

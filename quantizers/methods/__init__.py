"""Rounding methods: how the grid of a format is fitted to a weight, one file per method."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..._base.registry import Registry
from ..format import Format
from ..grid import Grid

METHODS: Registry[Callable[[Tensor, Format], Grid | None]] = Registry("method", __name__)

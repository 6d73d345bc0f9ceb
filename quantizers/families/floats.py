"""Plain floats: nothing but a cast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..format import PER_CHANNEL, Family, Format, Tensors
from . import FAMILIES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@FAMILIES.register("floats")
class Floats(Family[None]):
    """Floats: every weight rounded by itself.

    The names of dtypes are other names of these formats.

    >>> fmt = Format.parse("float16")
    >>> fmt.name, fmt.bits, fmt.floating, fmt.stored_bytes((2, 3))
    ('fp16', 16, True, 12)

    References:
        IEEE 754-2019 (binary16, binary32); bfloat16: Kalamkar et al. (2019), "A study of BFLOAT16
        for deep learning training".
    """

    grammar = ", ".join(_DTYPES)
    examples = tuple(_DTYPES)

    def parse(self, text: str) -> Format | None:
        """See :class:`Family`."""
        name = _NAMES.get(text, text)
        if name not in _DTYPES:
            return None
        bits = 32 if name == "fp32" else 16
        return Format(name, "floats", bits, PER_CHANNEL, True, layout="dense", floating=True)

    def names(self) -> Iterable[str]:
        """All of them."""
        return _DTYPES

    def tensors(self, fmt: Format, shape: tuple[int, int]) -> Tensors:
        """One tensor, ``weight``."""
        return {"weight": (shape, _DTYPES[fmt.name])}

    def reach(self, fmt: Format, low: float, high: float) -> float:
        """The weights themselves are float16 or nothing is."""
        return max(-low, high) if fmt.name == "fp16" else 0.0

    def fit(self, weight: Tensor, fmt: Format, importance: Tensor | None = None) -> None:
        """Nothing to fit."""

    def render(self, weight: Tensor, fmt: Format, fitted: None, out: Tensor) -> None:
        """Cast there and back."""
        out.copy_(weight.to(_dtype(fmt)))

    def pack(self, weight: Tensor, fmt: Format, fitted: None) -> dict[str, Tensor]:
        """Cast."""
        return {"weight": weight.detach().to(_dtype(fmt)).contiguous()}

    def grid(self, fmt: Format, tensors: Mapping[str, Tensor]) -> None:
        """There are no codes."""

    def decode(
        self, fmt: Format, cols: int, tensors: Mapping[str, Tensor], rows: slice | Tensor
    ) -> Tensor:
        """The numbers as they are stored."""
        return tensors["weight"][rows]


def _dtype(fmt: Format) -> torch.dtype:
    import torch

    found = getattr(torch, _DTYPES[fmt.name])
    assert isinstance(found, torch.dtype)
    return found

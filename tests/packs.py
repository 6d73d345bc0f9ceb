"""Random packed weights for tests of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import PackedTensor


def random_packed(
    spec: str, shape: tuple[int, int], generator: torch.Generator | None = None
) -> PackedTensor:
    """A packed weight of random bits, and scales of either sign."""
    fmt, parts = Format.parse(spec), {}
    for name, (size, dtype) in fmt.tensors(shape).items():
        if dtype == "uint8":
            parts[name] = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        else:
            parts[name] = ((torch.rand(size, generator=generator) - 0.2) * 0.02).half()
    return PackedTensor(fmt, shape, parts)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest error over the largest magnitude."""
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())

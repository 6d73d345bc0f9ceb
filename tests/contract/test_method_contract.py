"""What every rounding method promises."""

from __future__ import annotations

import pytest
import torch

from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import render
from bitplan.quantizers.methods import METHODS

WEIGHT = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("kind", ["g32", "g64-asym", "gc", "gt-asym"])
def test_more_bits_mean_less_error_and_repeats_are_equal(name: str, kind: str) -> None:
    method = METHODS.get(name)
    errors = []
    for bits in (2, 3, 4, 5, 6, 8):
        fmt = Format.parse(f"int{bits}-{kind}")
        first, again = (render(WEIGHT, fmt, method(WEIGHT, fmt)) for _ in range(2))
        assert torch.equal(first, again)
        errors.append(float((first - WEIGHT).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize("name", METHODS.names())
def test_float_formats_need_no_grid(name: str) -> None:
    assert METHODS.get(name)(WEIGHT, Format.parse("bf16")) is None

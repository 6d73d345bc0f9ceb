"""Codes for normal weights: the levels of the literature, and errors that they are known for."""

from __future__ import annotations

import pytest
import torch

from bitplan.quantizers.families.normal_levels import levels
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence

rtn, fisher_gptq = METHODS.get("rtn"), METHODS.get("fisher_gptq")
# Max (1960), table I: the positive levels, and the mean squared error.
PUBLISHED = {
    2: ((0.4528, 1.510), 0.1175),
    3: ((0.2451, 0.7560, 1.344, 2.152), 0.03454),
    4: ((0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733), 0.009497),
}


def drawn(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss(spec: str, weight: torch.Tensor) -> float:
    """The least squared error relative to the weight's, by the method that minimizes it."""
    evidence = Evidence(fisher=torch.eye(weight.shape[1]), damping=1e-6)
    error = fisher_gptq(weight, Format.parse(spec), evidence).dequantize() - weight
    return float(error.square().sum() / weight.square().sum())


@pytest.mark.parametrize("bits", PUBLISHED)
def test_levels_are_those_of_the_paper(bits: int) -> None:
    published, error = PUBLISHED[bits]
    assert levels(bits)[2 ** (bits - 1) :] == pytest.approx(published, abs=6e-4)
    assert [-level for level in reversed(levels(bits))] == list(levels(bits))
    assert loss(f"nl{bits}-gc", drawn((128, 1024), 0) / 16) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.93), (3, 0.97), (4, 0.89)])
def test_they_suit_normal_weights_better_than_even_ones(bits: int, share: float) -> None:
    weight = drawn((64, 1024), 1) / 16
    assert loss(f"nl{bits}-g64", weight) < share * loss(f"int{bits}-g64", weight)


def test_a_row_of_many_weights_with_an_outlier_keeps_its_scale() -> None:
    """Scales follow the root mean square, not the largest weight."""
    weight = drawn((8, 4096), 2) / 16
    plain = rtn(weight, Format.parse("nl3-gc"), Evidence()).tensors["scale"].clone()
    weight[:, 7] = 1.0
    with_outlier = rtn(weight, Format.parse("nl3-gc"), Evidence()).tensors["scale"]
    assert (with_outlier / plain).max() < 1.3

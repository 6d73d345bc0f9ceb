"""Codes for normal weights: the levels of the literature, and errors that they are known for."""

from __future__ import annotations

import pytest
import torch

from bitplan.quantizers.families.normal_levels import levels
from bitplan.quantizers.families.vector import codebook
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.pairs import nearest_points, values_of

fisher_gptq = METHODS.get("fisher_gptq")
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


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1078), (3, 0.02992)])
def test_points_are_means_of_what_is_nearest_to_them(bits: int, error: float) -> None:
    """Lloyd's condition, by a sum over small squares; one point moved, and it does not hold."""
    points = torch.tensor(codebook(bits), dtype=torch.float64)
    axis = torch.linspace(-5.5, 5.5, 301, dtype=torch.float64) + 0.001
    cells = torch.cartesian_prod(axis, axis)
    mass = (-cells.square().sum(1) / 2).exp()
    nearest = torch.cdist(cells, points).argmin(1)
    total = torch.zeros(len(points), dtype=torch.float64).index_add_(0, nearest, mass)
    means = torch.zeros_like(points).index_add_(0, nearest, mass[:, None] * cells)
    assert (means / total[:, None] - points).abs().max() < 0.03
    squares = (cells - points[nearest]).square().sum(1) / 2
    assert float((squares * mass).sum() / mass.sum()) == pytest.approx(error, rel=0.003)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.94), (3, 0.91)])
def test_pairs_lose_less_than_single_levels(bits: int, share: float) -> None:
    weight = drawn((64, 1024), 1) / 16
    assert loss(f"vq{bits}-g64", weight) < share * loss(f"nl{bits}-g64", weight)


@pytest.mark.parametrize("cols", [64, 65, 1])
def test_pairs_get_the_nearest_points(cols: int) -> None:
    """Of all, by distance; a column without a neighbour one of the first 2^b."""
    values, points = drawn((50, cols), 3), torch.tensor(codebook(2))
    codes = nearest_points(values, points, 2)
    found = values_of(codes, points, 2)
    even = cols // 2 * 2
    pairs = values[:, :even].reshape(-1, 2)
    best = torch.cdist(pairs.double(), points.double()).amin(1).float()
    assert torch.allclose((pairs - found[:, :even].reshape(-1, 2)).norm(dim=1), best, atol=1e-5)
    if cols % 2:
        off = (values[:, -1:] - points[:4, 0]).abs().amin(1)
        assert torch.allclose((values[:, -1] - found[:, -1]).abs(), off, atol=1e-6)

"""Trellis codes: the best walks, what they lose of normal weights, and that both ways agree."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitplan.kernels.layouts import StoredLayout, prepare
from bitplan.models.packed_modules import PackedLinear
from bitplan.quantizers import native_trellis, trellis
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.native_rounding import warn
from bitplan.quantizers.packed import PackedTensor, pack_bits

rtn, fisher_gptq = METHODS.get("rtn"), METHODS.get("fisher_gptq")
compiled = pytest.mark.skipif(
    native_trellis.LIBRARY.find()[0] is None, reason="needs the compiled walks"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def curvature(cols: int) -> Tensor:
    inputs = normal(300, 5, seed=1) @ normal(5, cols, seed=2) + normal(300, cols, seed=3)
    return inputs.T @ inputs / 300


def cost(weight: Tensor, packed: PackedTensor, hessian: Tensor) -> float:
    error = (packed.dequantize() - weight).double()
    return float((error @ hessian.double() * error).sum())


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    warn.cache_clear()  # it is said once
    monkeypatch.setattr(native_trellis.LIBRARY, "find", lambda: (None, "There is no compiler."))


@pytest.mark.parametrize(("bits", "most"), [(2, 1.20), (3, 1.25), (4, 1.30)])
@compiled
def test_losses_on_normal_weights_are_near_the_bound(bits: int, most: float) -> None:
    """The mean squared error of any code of b bits is at least 4^-b."""
    weight = normal(1024, 64) / 30
    error = rtn(weight, Format.parse(f"tcq{bits}"), Evidence()).dequantize() - weight
    share = float(error.square().sum() / weight.square().sum())
    assert 1 < share * 4**bits < most


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_normal_and_spread_after_every_state(bits: int) -> None:
    values = np.array(trellis.table(bits))
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.02
    assert (values.astype(np.float16) == values).all()
    following = np.sort(values.reshape(-1, 2**bits), axis=1)
    assert (following[:, 0] < 0).all() and (following[:, -1] > 0).all()
    central = values.reshape(-1, 2**bits)[trellis.start(bits)]
    assert abs(central.mean()) < 0.05


@pytest.mark.parametrize(("bits", "rows"), [(2, 4), (3, 3), (4, 2)])
@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=compiled)])
def test_walks_are_the_best_of_all(bits: int, rows: int, alone: bool) -> None:
    """Against every sequence of codes, also where rows count differently."""
    target, counts = normal(rows, 6, seed=4), torch.linspace(0.5, 2, rows)[:, None]
    sequences = torch.tensor(list(product(range(2**bits), repeat=rows)), dtype=torch.uint8).T
    every = trellis.levels(pack_bits(sequences.contiguous(), bits), None, bits, sequences.shape[1])
    least = ((every[:, None] - target[:, :, None]).square() * counts[:, :, None]).sum(0).amin(1)
    if alone:
        codes = torch.zeros(rows, 6, dtype=torch.uint8)
        trellis.choose(target, torch.ones(rows, 1), counts[:, 0], codes, bits, None, False)
        values = trellis.levels(pack_bits(codes, bits), None, bits, 6)
    else:
        codes, values = trellis.walks(target, counts, bits)
        assert torch.equal(values, trellis.levels(pack_bits(codes, bits), None, bits, 6))
    assert torch.allclose(((values - target).square() * counts).sum(0), least, rtol=1e-4)


@pytest.mark.parametrize("cols", [1, 3, 64, 70, 96])
def test_turning_keeps_lengths_and_can_be_undone(cols: int) -> None:
    weight = normal(5, cols)
    turned = trellis.turned(weight)
    assert torch.allclose(turned.norm(dim=1), weight.norm(dim=1), rtol=1e-5)
    assert torch.allclose(trellis.turned_back(turned), weight, atol=1e-5)
    if cols > 3:  # one direction goes into all others
        assert trellis.turned(torch.eye(cols)).abs().max() < 4 * cols**-0.5


@compiled
@pytest.mark.parametrize("bits", [2, 3])
def test_both_ways_cost_the_same(bits: int, request: pytest.FixtureRequest) -> None:
    weight, hessian = normal(24, 20) / 20, curvature(20)
    fmt, evidence = Format.parse(f"tcq{bits}"), Evidence(fisher=hessian, damping=0.01)
    fast = cost(weight, fisher_gptq(weight, fmt, evidence), hessian)
    request.getfixturevalue("torch_alone")
    with pytest.warns(UserWarning, match="no compiler"):
        slow = cost(weight, fisher_gptq(weight, fmt, evidence), hessian)
    assert slow == pytest.approx(fast, rel=0.02)


@compiled
def test_feedback_and_later_passes_lower_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, fmt = normal(200, 64) / 20, curvature(64), Format.parse("tcq2")
    evidence = Evidence(fisher=hessian, damping=0.01)
    nearest = cost(weight, rtn(weight, fmt, evidence), hessian)
    found = cost(weight, fisher_gptq(weight, fmt, evidence), hessian)
    assert found < 0.8 * nearest
    choose = trellis.choose

    def once(*args: Any, **named: Any) -> None:
        if not named["given"]:
            choose(*args, **named)

    monkeypatch.setattr(trellis, "choose", once)
    assert found < cost(weight, fisher_gptq(weight, fmt, evidence), hessian)


@compiled
def test_rows_that_count_more_lose_less() -> None:
    weight, hessian, fmt = normal(64, 32) / 20, torch.eye(32), Format.parse("tcq2")
    rows = torch.ones(64)
    rows[::2] = 20.0
    errors = []
    for counts in (None, rows):
        packed = fisher_gptq(weight, fmt, Evidence(fisher=hessian, rows=counts, damping=1e-3))
        errors.append((packed.dequantize() - weight).square().sum(1)[::2].sum())
    assert errors[1] < 0.9 * errors[0]


@compiled
@pytest.mark.parametrize("fixture", ["torch_alone", "tmp_path"])
def test_rows_that_count_for_nothing_are_not_lost(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(fixture)
    weight, counts = normal(64, 16), torch.ones(64)
    weight[7] *= 1e-3
    weight[9], counts[5] = 0, 0
    for some in (counts, torch.zeros(64)):
        coded = trellis.encode(weight, 4, torch.eye(16), some, 1e-3)
        found = trellis.decode(coded, 4, 16)
        error = (found - weight).square().sum(1) / weight.square().sum(1)
        assert error[[5, 7]].max() < 0.5
        assert error.nanmedian() < 0.02
        assert not found[9].any()


def test_many_rows_are_several_walks_and_any_rows_can_be_read() -> None:
    weight, fmt = normal(trellis.TILE + 70, 3), Format.parse("tcq3")
    packed = rtn(weight, fmt, Evidence())
    whole = packed.dequantize()
    assert ((whole - weight).square().mean(1)[-70:] < 0.5).all()
    rows = torch.tensor([trellis.TILE, 5, trellis.TILE + 1, trellis.TILE - 1, 0])
    assert torch.equal(packed.dequantize(rows), whole[rows])
    with pytest.raises(ValueError, match="depend on the rows before them"):
        fitted = packed.fitted()
        assert fitted is not None
        PackedTensor.pack(weight[:4], fmt, fitted.rows(slice(0, 4)))


@compiled
def test_layers_decode_them_before_the_product() -> None:
    """No kernel reads the codes: the path is that of dequantized weights, on any device."""
    weight, fmt = normal(48, 40) / 10, Format.parse("tcq4")
    packed = rtn(weight, fmt, Evidence())
    layout, x = prepare(packed, torch.device("cpu")), normal(2, 40, seed=5)
    assert isinstance(layout, StoredLayout)
    assert torch.allclose(layout.linear(x, None), x @ packed.dequantize().T, atol=1e-5)
    compiled_layer = torch.compile(
        PackedLinear(packed, None, weight), backend="aot_eager", fullgraph=True
    )
    assert torch.allclose(compiled_layer(x), layout.linear(x, None), atol=1e-5)

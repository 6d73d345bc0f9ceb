"""GPTQ: codes that make up for each other's errors, in every integer format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import render
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.methods.gptq import DAMPING
from bitplan.quantizers.methods.rtn import fit_grid

GROUPS = ("g32", "g64", "g128", "g256", "gc", "gt")
FORMATS = [
    f"int{b}-{g}{z}" for b in (1, 2, 3, 4, 5, 6, 7, 8) for g in GROUPS for z in ("", "-asym")
]
gptq, rtn = METHODS.get("gptq"), METHODS.get("rtn")


def correlated(cols: int, seed: int = 0, count: int = 600) -> Tensor:
    """Second moments [cols, cols] of inputs that share a few directions."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 12, generator=generator) @ torch.randn(
        12, cols, generator=generator
    )
    x = common + torch.randn(count, cols, generator=generator)
    return x.T @ x / count


def weight_of(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(7)) * 0.05


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T)."""
    error = (weight - rounded).double()
    return float((error @ hessian.double() * error).sum())


def textbook(weight: Tensor, fmt: Format, hessian: Tensor) -> Tensor:
    """Algorithm 1 of Frantar et al. (2023) as it is printed, one column at a time, in float64."""
    cols = weight.shape[1]
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(cols)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, result = weight.double().clone(), torch.empty_like(weight)
    grouped = fmt.group_size > 0
    grid = None if grouped else fit_grid(weight, fmt)
    for i in range(cols):
        if grouped and i % fmt.group_size == 0:
            grid = fit_grid(left[:, i : i + fmt.group_size].float(), fmt)
        result[:, i] = render(left[:, i : i + 1].float(), fmt, grid)[:, 0]
        error = (left[:, i] - result[:, i]) / upper[i, i]
        left[:, i:] -= torch.outer(error, upper[i, i:])
    return result


@pytest.mark.parametrize("spec", FORMATS)
def test_its_errors_cost_less_than_the_nearest_ones(spec: str) -> None:
    fmt, weight, hessian = Format.parse(spec), weight_of(48, 160), correlated(160)
    packed = gptq(weight, fmt, Evidence(hessian))
    assert packed.fmt == fmt and packed.nbytes == fmt.stored_bytes((48, 160))
    nearest = rtn(weight, fmt, Evidence()).dequantize()
    assert loss(weight, packed.dequantize(), hessian) < loss(weight, nearest, hessian)


@pytest.mark.parametrize(
    "spec", ["int2-g32", "int3-g64-asym", "int4-g128-asym", "int3-g256", "int4-gc-asym", "int3-gt"]
)
def test_its_codes_are_those_of_the_printed_algorithm(spec: str) -> None:
    fmt, weight, hessian = Format.parse(spec), weight_of(40, 328), correlated(328)
    found = gptq(weight, fmt, Evidence(hessian)).dequantize()
    expected = textbook(weight, fmt, hessian)
    # A tie that float32 breaks the other way changes the rest of its row: few rows may differ.
    equal = (found == expected).all(dim=1)
    assert equal.float().mean() >= 0.9
    assert loss(weight, found, hessian) == pytest.approx(loss(weight, expected, hessian), rel=1e-3)


def test_the_data_matter() -> None:
    fmt, weight = Format.parse("int3-g32"), weight_of(32, 96)
    first, second = (
        gptq(weight, fmt, Evidence(correlated(96, seed))).dequantize() for seed in (1, 2)
    )
    assert not torch.equal(first, second)
    uncorrelated = gptq(weight, fmt, Evidence(torch.eye(96))).dequantize()
    assert torch.equal(uncorrelated, rtn(weight, fmt, Evidence()).dequantize())


def test_columns_without_inputs_are_rounded_to_nearest() -> None:
    fmt, weight, hessian = Format.parse("int4-g32-asym"), weight_of(16, 64), correlated(64)
    hessian[:, 32:] = 0
    hessian[32:] = 0
    found = gptq(weight, fmt, Evidence(hessian)).dequantize()
    nearest = rtn(weight, fmt, Evidence()).dequantize()
    assert torch.equal(found[:, 32:], nearest[:, 32:])
    assert not torch.equal(found[:, :32], nearest[:, :32])
    nothing = gptq(weight, fmt, Evidence(torch.zeros(64, 64))).dequantize()
    assert torch.equal(nothing, nearest)


@pytest.mark.parametrize("rank", [1, 3])
def test_few_samples_are_enough_for_a_factor(rank: int) -> None:
    x = torch.randn(rank, 256, generator=torch.Generator().manual_seed(0)) * 1e4
    fmt, weight, hessian = Format.parse("int3-g64"), weight_of(24, 256), x.T @ x / rank
    found = gptq(weight, fmt, Evidence(hessian)).dequantize()
    assert found.isfinite().all()
    assert loss(weight, found, hessian) < 0.1 * loss(
        weight, rtn(weight, fmt, Evidence()).dequantize(), hessian
    )


@pytest.mark.parametrize("spec", ["int3-g32-asym", "int4-gc", "int4-gt-asym", "int2-g64"])
@pytest.mark.parametrize("shape", [(4, 12, 80), (96, 1, 9)])
def test_blocks_of_rows_have_inputs_of_their_own(spec: str, shape: tuple[int, int, int]) -> None:
    parts, rows, cols = shape
    fmt, weight = Format.parse(spec), weight_of(parts * rows, cols)
    hessians = torch.stack([correlated(cols, seed) for seed in range(parts)])
    found = gptq(weight, fmt, Evidence(hessians)).dequantize()
    if fmt.group_size >= 0:  # scales are not shared between blocks
        alone = [
            gptq(block, fmt, Evidence(hessian)).dequantize()
            for block, hessian in zip(weight.split(rows), hessians, strict=True)
        ]
        assert (found == torch.cat(alone)).float().mean() > 0.999
    nearest = rtn(weight, fmt, Evidence()).dequantize().split(rows)
    blocks = list(zip(weight.split(rows), found.split(rows), nearest, hessians, strict=True))
    ours = sum(loss(w, q, h) for w, q, _, h in blocks)
    assert ours < sum(loss(w, q, h) for w, _, q, h in blocks)


def test_many_rows_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, weight, hessian = Format.parse("int3-g64-asym"), weight_of(50, 96), correlated(96)
    whole = gptq(weight, fmt, Evidence(hessian)).dequantize()
    monkeypatch.setattr("bitplan.quantizers.sweep.CHUNK", 96 * 7)
    pieces = gptq(weight, fmt, Evidence(hessian)).dequantize()
    assert (whole == pieces).float().mean() > 0.999


@pytest.mark.parametrize("spec", ["bf16", "fp16", "q4_k", "iq4_nl", "q4_1"])
def test_other_formats_are_rounded_to_nearest(spec: str) -> None:
    fmt, weight = Format.parse(spec), weight_of(8, 256)
    found, nearest = (m(weight, fmt, Evidence(correlated(256))) for m in (gptq, rtn))
    assert torch.equal(found.dequantize(), nearest.dequantize())
    assert not METHODS.trait("gptq", "rounds")(fmt)


def test_a_lookup_table_is_rounded_to_nearest() -> None:
    fmt, weight = Format.parse("int4-g32"), weight_of(8, 64)
    assert torch.equal(
        gptq(weight, fmt, Evidence()).dequantize(), rtn(weight, fmt, Evidence()).dequantize()
    )


def test_the_factor_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, weight = Evidence(correlated(64)), weight_of(8, 64)
    gptq(weight, Format.parse("int4-g32"), evidence)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *_: pytest.fail("factored again"))
    gptq(weight, Format.parse("int3-g64"), evidence)


def test_what_does_not_fit_is_refused() -> None:
    fmt, weight = Format.parse("int4-g32"), weight_of(8, 64)
    with pytest.raises(ValueError, match=r"\[8, 64\] does not go with .* \[32, 32\]"):
        gptq(weight, fmt, Evidence(torch.eye(32)))
    with pytest.raises(ValueError, match="NaN or Inf"):
        gptq(weight, fmt, Evidence(torch.full((64, 64), torch.nan)))

"""Rounding on the curvature of the KL: what it costs, what it keeps, and that its ways agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitplan.quantizers import native_rounding, rounding
from bitplan.quantizers.feedback import Quadratic, factor
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence, rounding_device
from bitplan.quantizers.methods.fisher_gptq import DAMPING, RATIOS
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.sweep import Lattice
from bitplan.testing.toys import drawn

INTEGERS = ("int1-g32", "int2-g64-asym", "int3-g128", "int4-gc-asym", "int3-gc", "int8-g32-asym")
LEVELS = (
    "nf4-g64",
    "nl2-g64",
    "nl3-gc",
    "nf4-gc",
    "q4_1",
    "iq4_nl",
    "mxfp4",
    "q2_k",
    "q3_k",
    "q4_k",
    "q6_k",
    "iq4_xs",
)
OTHERS = ("int4-gt-asym", "int3-gt", "int3-g64-asym+lr4", "nf4-g64+lr2")
fisher_gptq, gptq, rtn = (METHODS.get(name) for name in ("fisher_gptq", "gptq", "rtn"))

compiled = pytest.mark.skipif(
    native_rounding.LIBRARY.find()[0] is None, reason="needs the compiled rounding loops"
)


def curvature(cols: int, seed: int = 0, count: int = 400) -> Tensor:
    """[cols, cols], of directions that some columns share and scales that differ."""
    inputs = drawn((count, 8), seed) @ drawn((8, cols), seed + 1) + drawn((count, cols), seed + 2)
    inputs *= drawn((cols,), seed + 3).exp()
    return inputs.T @ inputs / count


def weight_of(rows: int, cols: int, seed: int = 9) -> Tensor:
    return drawn((rows, cols), seed) / 20


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """H in float64 with a share of its mean diagonal added."""
    mean = hessian.double().diagonal().mean()
    return hessian.double() + damping * mean * torch.eye(len(hessian), dtype=torch.float64)


def costs(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """E H E^T of every row, float64."""
    error = (weight - values).double()
    return (error @ hessian.double() * error).sum(1)


def cost(weight: Tensor, packed: PackedTensor, hessian: Tensor) -> float:
    return float(costs(weight, packed.dequantize(), hessian).sum())


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_rounding, "library", lambda _: None)


@pytest.mark.parametrize("spec", [*INTEGERS, *LEVELS, *OTHERS])
def test_it_costs_far_less_than_the_nearest_codes(spec: str) -> None:
    fmt, weight, hessian = Format.parse(spec), weight_of(40, 300), curvature(300)
    packed = fisher_gptq(weight, fmt, Evidence(fisher=hessian))
    assert packed.fmt == fmt and packed.nbytes == fmt.stored_bytes((40, 300))
    nearest = rtn(weight, fmt, Evidence())
    assert cost(weight, packed, hessian) < 0.75 * cost(weight, nearest, hessian)
    if METHODS.trait("gptq", "rounds")(fmt):
        plain = gptq(weight, fmt, Evidence(hessian=hessian))
        assert cost(weight, packed, hessian) < cost(weight, plain, hessian)


@pytest.mark.parametrize("spec", ["int3-g64+lr4", "nf4-g32+lr8"])
@pytest.mark.parametrize("parts", [1, 3])
def test_low_rank_corrections_make_up_for_what_codes_lose(spec: str, parts: int) -> None:
    fmt, weight = Format.parse(spec), weight_of(parts * 30, 200)
    evidence = Evidence(fisher=torch.stack([curvature(200, 5 * i) for i in range(parts)]))
    assert fmt.base is not None and evidence.fisher is not None
    corrected, plain = (fisher_gptq(weight, f, evidence).dequantize() for f in (fmt, fmt.base))
    blocks = zip(
        weight.split(30), corrected.split(30), plain.split(30), evidence.fisher, strict=True
    )
    for some, with_it, without, hessian in blocks:
        own = damped(hessian)
        assert costs(some, with_it, own).sum() < 0.97 * costs(some, without, own).sum()


def one_at_a_time(weight: Tensor, fmt: Format, hessian: Tensor, lattice: Lattice) -> Tensor:
    """The printed algorithm of GPTQ on given scales, by inverses, in float64: values."""
    quadratic = Quadratic.of(hessian, DAMPING, lattice.size)
    order = quadratic.order[0].tolist()
    left, values = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    levels = lattice.levels
    codes = torch.arange(2**fmt.bits, dtype=torch.float64)
    for i, column in enumerate(order):
        rest = order[i:]
        inverse = torch.linalg.inv(damped(hessian)[rest][:, rest])
        group = column // lattice.size
        offset = 0.0 if lattice.offset is None else lattice.offset[:, group, None].double()
        zero = lattice.zero[:, group, None].double()
        each = codes - zero if levels is None else levels.double().expand(len(weight), -1)
        reachable = each * lattice.scale[:, group, None].double() + offset
        nearest = (reachable - left[:, column, None]).abs().argmin(1, keepdim=True)
        values[:, column] = reachable.gather(1, nearest)[:, 0]
        error = left[:, column] - values[:, column]
        left[:, rest] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return values


@pytest.mark.parametrize(
    "spec", ["int2-g32-asym", "int3-g32", "int4-gc", "nf4-g32", "q4_1", "q2_k"]
)
@pytest.mark.parametrize("alone", [False, True])
def test_the_sweep_is_that_of_inverses_in_float64(
    spec: str, alone: bool, request: pytest.FixtureRequest
) -> None:
    if alone:
        request.getfixturevalue("torch_alone")
    fmt, weight, hessian = Format.parse(spec), weight_of(12, 80), curvature(80)
    size = fmt.group_size if fmt.group_size > 0 else 80
    quadratic = Quadratic.of(hessian, DAMPING, size)
    if fmt.integer and fmt.group_size > 0:
        lattice = Lattice.empty(fmt, weight)
        codes = rounding.sweep(weight, fmt, quadratic, lattice, RATIOS[fmt.bits])
    else:
        grid = METHODS.trait("rtn", "grid")(weight, fmt, hessian.diagonal())
        lattice = Lattice.of(fmt, grid, 12, 80)
        codes = rounding.sweep(weight, fmt, quadratic, lattice)
    expected = one_at_a_time(weight, fmt, hessian, lattice)
    ours, theirs = (costs(weight, v, damped(hessian)) for v in (lattice.values(codes), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spec", ["int3-g32-asym", "int4-g64"])
def test_grids_are_fitted_to_what_is_left_of_errors(spec: str) -> None:
    """By brute force over scales: none does clearly better on the first group of the sweep."""
    fmt, weight, hessian = Format.parse(spec), weight_of(6, 128), curvature(128)
    quadratic = Quadratic.of(hessian, DAMPING, fmt.group_size)
    lattice = Lattice.empty(fmt, weight)
    rounding.sweep(weight, fmt, quadratic, lattice, RATIOS[fmt.bits])
    first = quadratic.order[0, : fmt.group_size]
    block, group = weight[:, first], int(first[0]) // fmt.group_size

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        code = (block / scale[:, None] + zero[:, None]).round().clamp(0, 2**fmt.bits - 1)
        error = (block - (code - zero[:, None]) * scale[:, None]).square()
        return (error * quadratic.pivots[0, : fmt.group_size]).sum(1)

    found = errors(lattice.scale[:, group], lattice.zero[:, group])
    best = torch.full_like(found, torch.inf)
    zeros = [fmt.zero_point] if fmt.symmetric else range(2**fmt.bits)
    for sign in (1, -1) if fmt.symmetric else (1,):
        for step in torch.linspace(0.2, 1.2, 400):
            width = block.abs().amax(1) if fmt.symmetric else block.amax(1) - block.amin(1)
            for zero in zeros:
                scale = sign * step * width / (2**fmt.bits - 1) * (2 if fmt.symmetric else 1)
                best = torch.minimum(best, errors(scale, torch.full_like(scale, zero)))
    assert (found <= 1.06 * best).all()
    assert float(found.sum()) <= 1.02 * float(best.sum())


@compiled
@pytest.mark.parametrize("spec", [*INTEGERS, *LEVELS, *OTHERS])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_compiled_way_and_that_of_torch_agree(
    spec: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, weight = Format.parse(spec), weight_of(parts * 30, 300)
    hessians = torch.stack([curvature(300, 5 * i) for i in range(parts)])
    packed = fisher_gptq(weight, fmt, Evidence(fisher=hessians))
    monkeypatch.setattr(native_rounding, "library", lambda _: None)
    other = fisher_gptq(weight, fmt, Evidence(fisher=hessians))
    values = packed.dequantize(), other.dequantize()
    # Where sums differ in the last bit a tie may break the other way, and change a row.
    alike = (values[0] == values[1]).all(1).float().mean()
    assert alike > (0.85 if fmt.rank == 0 and fmt.group_size >= 0 else -1)
    first, second = (
        sum(
            float(costs(w, q, h).sum())
            for w, q, h in zip(weight.split(30), v.split(30), hessians, strict=True)
        )
        for v in values
    )
    assert first == pytest.approx(second, rel=0.05 if fmt.rank else 0.01)


@compiled
@pytest.mark.parametrize("spec", ["int3-g64-asym", "int4-gc", "nf4-g32", "q3_k"])
def test_rows_depend_neither_on_threads_nor_on_each_other(spec: str) -> None:
    fmt, weight, hessian = Format.parse(spec), weight_of(150, 200), curvature(200)
    threads = torch.get_num_threads()
    whole = fisher_gptq(weight, fmt, Evidence(fisher=hessian)).dequantize()
    try:
        torch.set_num_threads(3)
        again = fisher_gptq(weight, fmt, Evidence(fisher=hessian)).dequantize()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, again)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 131), torch.randperm(150)):
        some = fisher_gptq(weight[rows], fmt, Evidence(fisher=hessian)).dequantize()
        assert torch.equal(some, whole[rows])


def test_many_rows_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, parts in (("int3-g64-asym", 1), ("int4-gt-asym", 1), ("q4_k", 2), ("int2-gc", 2)):
        fmt, weight = Format.parse(spec), weight_of(50, 96)
        evidence = Evidence(fisher=torch.stack([curvature(96, i) for i in range(parts)]))
        whole = fisher_gptq(weight, fmt, evidence).dequantize()
        with monkeypatch.context() as patch:
            patch.setattr("bitplan.quantizers.sweep.CHUNK", 96 * 7)
            pieces = fisher_gptq(weight, fmt, replace(evidence, kept={})).dequantize()
        assert (whole == pieces).all(1).float().mean() > 0.9


@pytest.mark.parametrize("spec", ["int3-g64-asym", "int2-gc", "q4_k"])
def test_every_value_lies_on_the_grid_that_is_stored(spec: str) -> None:
    fmt, weight = Format.parse(spec), weight_of(20, 300)
    packed = fisher_gptq(weight, fmt, Evidence(fisher=curvature(300)))
    again = PackedTensor.pack(packed.dequantize(), fmt, packed.fitted())
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_columns_without_curvature_do_no_harm() -> None:
    fmt, weight, hessian = Format.parse("int4-g32-asym"), weight_of(16, 96), curvature(96)
    hessian[:, 32:64] = hessian[32:64] = 0
    packed = fisher_gptq(weight, fmt, Evidence(fisher=hessian))
    assert packed.dequantize().isfinite().all()
    assert (packed.dequantize() - weight)[:, 32:64].abs().max() < 0.3 * weight.abs().max()
    assert cost(weight, packed, hessian) < cost(weight, rtn(weight, fmt, Evidence()), hessian)
    nothing = fisher_gptq(weight, fmt, Evidence(fisher=torch.zeros(96, 96)))
    plain = (rtn(weight, fmt, Evidence()).dequantize() - weight).square().sum()
    assert (nothing.dequantize() - weight).square().sum() <= plain  # damping is all there is


def test_damping_is_the_evidence_s() -> None:
    fmt, weight, hessian = Format.parse("int3-g64"), weight_of(24, 128), curvature(128, count=40)
    found = {
        damping: fisher_gptq(weight, fmt, Evidence(fisher=hessian, damping=damping))
        for damping in (0.01, DAMPING, 1.0, None)
    }
    assert torch.equal(found[None].dequantize(), found[DAMPING].dequantize())
    for damping, rival in ((0.01, 1.0), (1.0, 0.01)):  # each is best by its own measure
        own, other = damped(hessian, damping), found[rival]
        assert cost(weight, found[damping], own) < cost(weight, other, own)


@pytest.mark.parametrize("spec", ["bf16", "fp16"])
def test_floats_and_lookup_tables_are_rounded_to_nearest(spec: str) -> None:
    weight, rounds = weight_of(8, 64), METHODS.trait("fisher_gptq", "rounds")
    fmt, table = Format.parse(spec), Format.parse("int4-g32")
    assert not rounds(fmt) and rounds(table)
    for some, evidence in ((fmt, Evidence(fisher=curvature(64))), (table, Evidence())):
        found = fisher_gptq(weight, some, evidence).dequantize()
        assert torch.equal(found, rtn(weight, some, Evidence()).dequantize())


def test_one_factor_serves_all_formats_of_as_large_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, weight = Evidence(fisher=curvature(128)), weight_of(8, 128)
    fisher_gptq(weight, Format.parse("int4-g32"), evidence)
    again = "bitplan.quantizers.feedback.factor"
    monkeypatch.setattr(again, lambda *_: pytest.fail("factored again"))
    fisher_gptq(weight, Format.parse("int3-g32-asym"), evidence)
    assert len(evidence.kept) == 1


def test_what_does_not_fit_is_refused() -> None:
    fmt, weight = Format.parse("int4-g32"), weight_of(8, 64)
    with pytest.raises(ValueError, match=r"\[8, 64\] does not go with .* \[32, 32\]"):
        fisher_gptq(weight, fmt, Evidence(fisher=torch.eye(32)))
    with pytest.raises(ValueError, match="NaN or Inf"):
        fisher_gptq(weight, fmt, Evidence(fisher=torch.full((64, 64), torch.nan)))


def test_the_factor_gives_back_the_matrix() -> None:
    hessian = curvature(50)
    feedback, pivots, added = factor(hessian, 0.1)
    product = feedback[0] @ torch.diag(pivots[0]) @ feedback[0].T
    torch.testing.assert_close(product, hessian + torch.diag(added[0]), rtol=1e-5, atol=1e-4)
    assert torch.equal(feedback[0].tril(-1), torch.zeros(50, 50))
    torch.testing.assert_close(added[0], torch.full((50,), 0.1) * hessian.diagonal().mean())


def test_groups_stay_together_the_largest_first() -> None:
    diagonal = torch.tensor([1.0, 2.0, 8.0, 9.0, 5.0, 6.0, 100.0])
    quadratic = Quadratic.of(torch.diag(diagonal), 0.5, 2)
    assert quadratic.order[0].tolist() == [3, 2, 5, 4, 1, 0, 6]  # a short group stays the last
    torch.testing.assert_close(
        quadratic.pivots[0], (diagonal + 0.5 * diagonal.mean())[quadratic.order[0]]
    )


def test_without_a_compiler_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_rounding.LIBRARY.forget()
    native_rounding.warn.cache_clear()
    try:
        with pytest.warns(UserWarning, match="No C.*rounding loops.*several times as long"):
            fisher_gptq(weight_of(4, 32), Format.parse("int4-g32"), Evidence(fisher=curvature(32)))
        native_rounding.warn.cache_clear()
        cuda = torch.device("cuda")
        with pytest.warns(UserWarning, match="several times as long"):
            assert rounding_device("fisher_gptq", cuda) == cuda
    finally:
        native_rounding.LIBRARY.forget()


@pytest.mark.parametrize("spec", ["int3-g32+lr4", "int3-g32-asym", "nf4-g32"])
@pytest.mark.parametrize("unit", [2.0**-80, 2.0**30])
def test_the_unit_of_the_curvature_does_not_matter(spec: str, unit: float) -> None:
    weight, fisher, fmt = weight_of(16, 64), curvature(64), Format.parse(spec)
    found, other = (
        fisher_gptq(weight, fmt, Evidence(fisher=some)) for some in (fisher, unit * fisher)
    )
    assert torch.equal(found.dequantize(), other.dequantize())

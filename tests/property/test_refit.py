"""Scales refitted to given codes: rows cost no more, and are stored as they were refitted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.quantizers import block_refit, refit
from bitplan.quantizers.blocks import layouts
from bitplan.quantizers.format import Format, families, family_of
from bitplan.quantizers.grid import Grid, decode, encode
from bitplan.quantizers.methods.rtn import fit_grid
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.refit import equations, refit_scales, right_sides

NAMES = [
    *(
        "int1-g32",
        "int2-g64-asym",
        "int3-g64",
        "int4-gc-asym",
        "int8-gt-asym",
        "nf4-g64",
        "nl3-g64",
    ),
    *("q4_1", "q5_1", "iq4_nl", "mxfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
]
formats = st.sampled_from([Format.parse(name) for name in NAMES])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight, some rows or columns of which may be 0, and a curvature, which may be singular."""
    rows, cols = draw(st.integers(1, 12)), draw(st.sampled_from([1, 31, 70, 256, 300, 520]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, cols, generator=generator) * draw(st.sampled_from([1e-4, 0.05, 10]))
    weight[-1] *= draw(st.sampled_from([0, 1]))
    inputs = torch.randn(draw(st.sampled_from([3, 400])), cols, generator=generator)
    inputs = inputs.cumsum(1) / cols**0.5 + 0.3 * inputs  # columns go together
    inputs[:, : cols // 4] *= draw(st.sampled_from([0, 1]))
    hessian = inputs.T @ inputs / len(inputs) * draw(st.sampled_from([1e-8, 1.0, 1e5]))
    return weight, hessian


def costs(weight: Tensor, found: Tensor, hessian: Tensor) -> Tensor:
    """``E H E^T`` of every row, float64."""
    error = (weight - found).double()
    return ((error @ hessian.double()) * error).sum(1)


def coded(weight: Tensor, fmt: Format, seed: int = 0) -> tuple[Grid, Tensor]:
    """A grid, and codes not all of which are the nearest on it."""
    grid = fit_grid(weight, fmt)
    assert isinstance(grid, Grid)
    codes = encode(weight, fmt, grid)
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(0, 2**fmt.bits, codes.shape, generator=generator, dtype=torch.uint8)
    return grid, torch.where(torch.rand(codes.shape, generator=generator) < 0.03, other, codes)


@given(formats, problems(), st.integers(0, 9))
@settings(max_examples=120, deadline=None)
def test_no_row_costs_more_and_all_is_stored(
    fmt: Format, problem: tuple[Tensor, Tensor], seed: int
) -> None:
    weight, hessian = problem
    grid, codes = coded(weight, fmt, seed)
    copies = weight.clone(), codes.clone(), hessian.clone(), *(p for p in grid if p is not None)
    better = family_of(fmt).refit(weight, fmt, grid, codes, hessian)
    before, after = (costs(weight, decode(codes, fmt, some), hessian) for some in (grid, better))
    if len(grid.scale) == 1:
        before, after = before.sum(0), after.sum(0)
    assert (after <= before * (1 + 1e-5) + 1e-12 * before.sum()).all()
    for old, new in zip(grid[:2], better[:2], strict=True):
        if old is not None and new is not None and old.is_floating_point():
            assert torch.equal(old.sign(), new.sign())  # what a tool may take for granted
    packed = PackedTensor.of_codes(codes, fmt, better)
    assert torch.equal(packed.dequantize(), decode(codes, fmt, better))
    kept = weight, codes, hessian, *(part for part in grid if part is not None)
    assert all(torch.equal(old, new) for old, new in zip(copies, kept, strict=True))


@pytest.mark.parametrize("spec", NAMES)
def test_the_whole_costs_clearly_less(spec: str) -> None:
    fmt = Format.parse(spec)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 600, generator=generator) / 16
    inputs = torch.randn(400, 600, generator=generator).cumsum(1) / 8
    hessian = inputs.T @ inputs / 400
    grid, codes = coded(weight, fmt)
    better = family_of(fmt).refit(weight, fmt, grid, codes, hessian)
    before, after = (costs(weight, decode(codes, fmt, s), hessian).sum() for s in (grid, better))
    assert after < (0.97 if fmt.group_size > 0 else 0.9999) * before


@pytest.mark.parametrize("spec", NAMES)
@pytest.mark.parametrize("module", [refit, block_refit])
def test_rows_are_refitted_alike_in_chunks(
    spec: str, module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large matrices are; a scale of the whole matrix belongs to all chunks."""
    fmt = Format.parse(spec)
    generator = torch.Generator().manual_seed(1)
    weight, inputs = (torch.randn(40, 300, generator=generator) for _ in range(2))
    grid, codes = coded(weight, fmt)
    arguments = weight, fmt, grid, codes, inputs.T @ inputs
    whole = decode(codes, fmt, family_of(fmt).refit(*arguments))
    monkeypatch.setattr(refit, "CHUNK", 3 * 300)
    parts = decode(codes, fmt, family_of(fmt).refit(*arguments))
    assert torch.allclose(parts, whole, atol=2e-3 * float(whole.abs().max()))


def test_scales_solve_the_normal_equations() -> None:
    """Against least squares in float64, on codes for which that is exact."""
    generator = torch.Generator().manual_seed(2)
    levels = torch.randint(-4, 4, (6, 70), generator=generator).float()
    scale = 0.05 + torch.rand(6, 3, generator=generator)
    start = (scale * (1 + 0.1 * torch.randn(6, 3, generator=generator))).half()
    weight = levels * scale.repeat_interleave(32, 1)[:, :70]
    inputs = torch.randn(300, 70, generator=generator)
    found = refit_scales(weight, levels, start, inputs.T @ inputs / 300, 32)
    assert (found.float() / scale - 1).abs().max() < 2e-3  # the ridge, and float16


@pytest.mark.parametrize("offsets", [False, True])
def test_equations_are_those_of_the_quadratic(offsets: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    levels, error = (torch.randn(70, 5, generator=generator) for _ in range(2))
    inputs = torch.randn(80, 70, generator=generator)
    hessian = inputs.T @ inputs / 80
    left = equations(levels, hessian, 32, offsets)
    right = right_sides(hessian @ error, levels, 32, offsets)
    place = torch.arange(70) // 32 == torch.arange(3)[:, None]
    for row in range(5):
        bases = [place * levels[:, row], 1.0 * place][: 1 + offsets]
        basis = torch.cat(bases)
        assert torch.allclose(left[:, :, row], basis @ hessian @ basis.T, atol=1e-4)
        assert torch.allclose(right[:, row], basis @ hessian @ error[:, row], atol=1e-4)


@pytest.mark.parametrize("spec", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_no_neighbours_of_the_integers_of_a_group_cost_less(spec: str) -> None:
    """Once nothing changes any more: the best scale for each of three minimums was tried."""
    fmt = Format.parse(spec)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 256, generator=generator) / 16 + 0.03
    inputs = torch.randn(400, 256, generator=generator)
    inputs = inputs.cumsum(1) / 16 + inputs
    hessian = inputs.T @ inputs / 400
    grid, codes = coded(weight, fmt)
    for _ in range(20):
        grid = family_of(fmt).refit(weight, fmt, grid, codes, hessian)
    least = costs(weight, decode(codes, fmt, grid), hessian)
    assert grid.scales is not None
    low, high = layouts()[spec].scale_range or (0, 0)
    bias = layouts()[spec].bias
    for group in range(grid.scales.shape[1]):
        for step in (-1, 0, 1):
            for shift in (-1, 0, 1) if grid.mins is not None else (0,):
                scales, mins = grid.scales.int(), grid.mins
                scales[:, group] = (scales[:, group] + step).clamp(low + bias, high + bias)
                if mins is not None:
                    mins = mins.int()
                    mins[:, group] = (mins[:, group] + shift).clamp(0, high)
                    mins = mins.to(torch.uint8)
                other = grid._replace(scales=scales.to(torch.uint8), mins=mins)
                assert (costs(weight, decode(codes, fmt, other), hessian) > 0.9999 * least).all()


def test_families_without_a_refit_keep_their_grids() -> None:
    weight = torch.ones(2, 70)
    for family in families():
        for spec in family.examples:
            fmt = Format.parse(spec)
            if fmt.floating or fmt.rank:
                kept = fit_grid(weight, fmt)
                codes = torch.zeros(2, 70, dtype=torch.uint8)
                assert family.refit(weight, fmt, kept, codes, torch.eye(70)) is kept

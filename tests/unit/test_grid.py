"""Grids: rendering, clip search and its edge cases."""

import pytest
import torch
from torch import Tensor

from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import Grid, decode, encode, grid_rows, render
from bitplan.quantizers.methods import METHODS

fit_grid = METHODS.trait("rtn", "grid")


def relative_error(spec: str, weight: Tensor) -> float:
    """Squared error of the rendering over the squared weight."""
    fmt = Format.parse(spec)
    error = render(weight, fmt, fit_grid(weight, fmt)) - weight
    return float(error.square().sum() / weight.square().sum())


def normal(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def test_render_follows_the_formula() -> None:
    fmt = Format.parse("int2-g32-asym")
    grid = Grid(torch.tensor([[0.5]]).half(), torch.tensor([[1]], dtype=torch.uint8))
    weight = torch.tensor([[-9.0, -0.5, 0.1, 0.3, 0.9, 9.0]])
    assert encode(weight, fmt, grid).tolist() == [[0, 0, 1, 2, 3, 3]]
    assert render(weight, fmt, grid).tolist() == [[-0.5, -0.5, 0.0, 0.5, 1.0, 1.0]]


def test_render_into_its_own_input() -> None:
    fmt = Format.parse("int3-g64")
    weight = normal(4, 100)
    grid = fit_grid(weight, fmt)
    expected = render(weight, fmt, grid)
    assert render(weight, fmt, grid, out=weight) is weight
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("spec", ["int4-g64-asym", "int4-g64", "int3-gc", "int2-gt-asym"])
def test_rows_render_like_the_whole(spec: str) -> None:
    fmt = Format.parse(spec)
    weight = normal(10, 100)
    grid = fit_grid(weight, fmt)
    rows = torch.tensor([7, 2, 2])
    assert torch.equal(
        render(weight[rows], fmt, grid_rows(grid, rows)), render(weight, fmt, grid)[rows]
    )


def test_large_matrices_render_in_chunks() -> None:
    fmt = Format.parse("int4-g64")
    weight = normal(4100, 512)  # more than one chunk of rows
    grid = fit_grid(weight, fmt)
    assert isinstance(grid, Grid)
    whole = render(weight, fmt, grid)
    assert torch.equal(whole, decode(encode(weight, fmt, grid), fmt, grid))
    assert torch.equal(whole[4090:], render(weight[4090:], fmt, grid_rows(grid, slice(4090, None))))


@pytest.mark.parametrize("spec", ["int4-g64-asym", "int4-g64", "int1-g64", "int8-gt"])
def test_zero_groups_render_to_zero(spec: str) -> None:
    fmt = Format.parse(spec)
    weight = torch.zeros(3, 100)
    grid = fit_grid(weight, fmt)
    assert torch.equal(render(weight, fmt, grid), weight)


def test_zero_is_representable() -> None:
    weight = normal(8, 64).add_(10)  # far from zero
    for spec in ("int4-g64-asym", "int2-g64-asym", "int4-g64"):
        fmt = Format.parse(spec)
        assert render(torch.zeros(8, 64), fmt, fit_grid(weight, fmt)).count_nonzero() == 0


def test_one_bit_symmetric_keeps_signs() -> None:
    fmt = Format.parse("int1-g64")
    weight = normal(4, 64)
    rendered = render(weight, fmt, fit_grid(weight, fmt))
    assert torch.equal(rendered.sign(), weight.sign())
    assert relative_error("int1-g64", weight) == pytest.approx(1 - 2 / torch.pi, abs=0.05)


def test_float_formats_only_cast() -> None:
    weight = normal(3, 5)
    fmt = Format.parse("bf16")
    assert fit_grid(weight, fmt) is None
    assert torch.equal(render(weight, fmt, None), weight.bfloat16().float())


def test_parameters_are_welcome() -> None:
    fmt = Format.parse("int4-g32")
    weight = torch.nn.Parameter(normal(4, 64))
    rendered = render(weight, fmt, fit_grid(weight, fmt))
    assert torch.equal(rendered, render(weight.detach(), fmt, fit_grid(weight.detach(), fmt)))
    assert not rendered.requires_grad


def test_non_contiguous_weights() -> None:
    fmt = Format.parse("int4-g32-asym")
    weight = normal(96, 40).T
    grid = fit_grid(weight, fmt)
    same = fit_grid(weight.contiguous(), fmt)
    assert isinstance(grid, Grid) and isinstance(same, Grid)
    assert torch.equal(grid.scale, same.scale)
    assert torch.equal(render(weight, fmt, grid), render(weight.contiguous(), fmt, same))


@pytest.mark.parametrize(
    ("value", "message"),
    [(1e6, "1e\\+06"), (float("nan"), "nan"), (float("inf"), "inf")],
)
@pytest.mark.parametrize("spec", ["int4-g64-asym", "int4-gt", "fp16"])
def test_weights_that_no_scale_can_hold_are_refused(spec: str, value: float, message: str) -> None:
    weight = normal(4, 64)
    weight[2, 3] = value
    with pytest.raises(ValueError, match=message):
        fit_grid(weight, Format.parse(spec))

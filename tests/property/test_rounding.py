"""Rounding under any quadratic: what lowers it never raises it, and codes stay codes."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.quantizers import native_rounding, rounding
from bitplan.quantizers.feedback import Quadratic
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.methods.fisher_gptq import DAMPING, RATIOS
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.sweep import Lattice

SPECS = [
    f"int{b}-g{g}{z}" for b in (1, 2, 3, 4, 5, 8) for g in ("32", "64", "c") for z in ("", "-asym")
]
SPECS += ["nf4-g32", "nl3-g32", "vq2-g32", "vq3-gc", "iq4_nl", "q2_k", "q4_1", "mxfp4"]
fisher_gptq, rtn = METHODS.get("fisher_gptq"), METHODS.get("rtn")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Format, Tensor]:
    """A weight [rows, cols], a format and the curvature [parts, cols, cols] of its columns."""
    parts, rows = draw(st.integers(1, 3)), draw(st.integers(4, 40))
    cols, count = draw(st.integers(33, 150)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    inputs = torch.randn(parts, count, cols, generator=generator)
    common = torch.randn(parts, 5, cols, generator=generator)
    shared = draw(st.sampled_from([0.0, 1.0, 10.0]))
    inputs += shared * torch.randn(parts, count, 5, generator=generator) @ common
    inputs *= (draw(st.sampled_from([0.0, 1.0, 2.0])) * common[:, :1]).exp()
    inputs[:, :, draw(st.lists(st.integers(0, cols - 1), max_size=3))] = 0
    weight = torch.randn(parts * rows, cols, generator=generator)
    weight *= draw(st.sampled_from([1e-3, 1.0, 100.0]))
    if draw(st.booleans()):
        weight[:, : cols // 2] = 0
    return weight, Format.parse(draw(st.sampled_from(SPECS))), inputs.mT @ inputs / count


def costs(weight: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    """Of every row, float64; for a damped H [parts, cols, cols]."""
    error = (weight - values).double().view(len(matrix), -1, weight.shape[1])
    return ((error @ matrix.double()) * error).sum(2).flatten()


def swept(weight: Tensor, fmt: Format, hessian: Tensor) -> tuple[Quadratic, Lattice, Tensor]:
    """The quadratic, and scales and codes after a sweep."""
    cols = weight.shape[1]
    size = fmt.group_size if 0 < fmt.group_size < cols else cols
    quadratic = Quadratic.of(hessian, DAMPING, size)
    if fmt.integer and fmt.group_size > 0:
        lattice = Lattice.empty(fmt, weight)
        return quadratic, lattice, rounding.sweep(weight, fmt, quadratic, lattice, RATIOS[fmt.bits])
    lattice = Lattice.of(fmt, METHODS.trait("rtn", "grid")(weight, fmt), *weight.shape)
    return quadratic, lattice, rounding.sweep(weight, fmt, quadratic, lattice)


@settings(max_examples=60, deadline=None)
@given(problems(), st.booleans())
def test_neither_descent_nor_new_scales_raise_the_cost_of_a_row(
    problem: tuple[Tensor, Format, Tensor], compiled: bool
) -> None:
    weight, fmt, hessian = problem
    library = native_rounding.library if compiled else lambda _: None
    with patch.object(native_rounding, "library", library):
        quadratic, lattice, codes = swept(weight, fmt, hessian)
        before = costs(weight, lattice.values(codes), quadratic.matrix)
        for _ in range(2):
            slopes = rounding.slope(weight - lattice.values(codes), quadratic)
            rounding.descend(codes, slopes, quadratic, lattice, 2)
            assert int(codes.max()) < 2**fmt.bits
            after = costs(weight, lattice.values(codes), quadratic.matrix)
            assert (after <= before * (1 + 1e-5) + 1e-12 * float(before.max())).all()
            fresh = rounding.slope(weight - lattice.values(codes), quadratic)
            torch.testing.assert_close(
                slopes, fresh, rtol=1e-3, atol=1e-4 * float(fresh.abs().max())
            )
            if fmt.layout == "codes":
                basis = lattice._replace(scale=torch.ones_like(lattice.scale)).values(codes)
                scale = rounding.refit(lattice.scale, basis, slopes, quadratic, lattice.size)
                assert torch.equal(scale, scale.half().float())
                lattice, before = lattice._replace(scale=scale), after
                after = costs(weight, lattice.values(codes), quadratic.matrix)
                assert (after <= before * (1 + 1e-5) + 1e-12 * float(before.max())).all()
            before = after


@settings(max_examples=60, deadline=None)
@given(problems())
def test_it_is_never_worse_than_the_nearest_codes(problem: tuple[Tensor, Format, Tensor]) -> None:
    weight, fmt, hessian = problem
    packed = fisher_gptq(weight, fmt, Evidence(fisher=hessian))
    size = fmt.group_size if 0 < fmt.group_size < weight.shape[1] else weight.shape[1]
    matrix = Quadratic.of(hessian, DAMPING, size).matrix
    ours = costs(weight, packed.dequantize(), matrix).sum()
    nearest = costs(weight, rtn(weight, fmt, Evidence()).dequantize(), matrix).sum()
    assert ours <= nearest * (1 + 1e-5)
    again = PackedTensor.pack(packed.dequantize(), fmt, packed.fitted())
    assert torch.equal(again.dequantize(), packed.dequantize())  # every value lies on its grid

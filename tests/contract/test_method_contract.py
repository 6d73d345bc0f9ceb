"""What every rounding method promises."""

from __future__ import annotations

import pytest
import torch

from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor

WEIGHT = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
INPUTS = torch.randn(400, 96, generator=torch.Generator().manual_seed(1)).cumsum(1)
EVIDENCE = Evidence(hessian=INPUTS.T @ INPUTS / len(INPUTS))
FIELDS = {"hessian"}  # of the evidence


def rounded(name: str, spec: str, evidence: Evidence = EVIDENCE) -> PackedTensor:
    return METHODS.get(name)(WEIGHT, Format.parse(spec), evidence)


def same(first: PackedTensor, second: PackedTensor) -> bool:
    pairs = zip(first.tensors.values(), second.tensors.values(), strict=True)
    return first.fmt == second.fmt and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("kind", ["g32", "g64-asym", "gc", "gt-asym"])
def test_more_bits_mean_less_error_and_repeats_are_equal(name: str, kind: str) -> None:
    costs = []
    for bits in (2, 3, 4, 5, 6, 8):
        first, again = (rounded(name, f"int{bits}-{kind}") for _ in range(2))
        assert first.shape == (24, 96)
        assert same(first, again)
        error = INPUTS @ (first.dequantize() - WEIGHT).T
        costs.append(float(error.square().mean()))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 1e-2 * costs[0]


@pytest.mark.parametrize("name", METHODS.names())
@pytest.mark.parametrize("spec", ["bf16", "q4_k", "int4-g32"])
def test_every_format_can_be_rounded_and_without_evidence_to_nearest(name: str, spec: str) -> None:
    found = rounded(name, spec, Evidence())
    assert same(found, rounded("rtn", spec))


@pytest.mark.parametrize("name", METHODS.names())
def test_traits_say_what_is_true(name: str) -> None:
    needs, rounds = METHODS.trait(name, "needs", set()), METHODS.trait(name, "rounds")
    assert set(needs) <= FIELDS
    grid = METHODS.trait(name, "grid")
    for spec in ("int3-g64-asym", "int2-gc", "q4_k", "bf16"):
        fmt, found = Format.parse(spec), rounded(name, spec)
        if grid is not None:
            assert same(found, PackedTensor.pack(WEIGHT, fmt, grid(WEIGHT, fmt)))
        if rounds is not None and not rounds(fmt):
            assert same(found, rounded("rtn", spec))
        if not needs:
            assert same(found, rounded(name, spec, Evidence()))

"""What every rounding method promises."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from ..quantizers.format import Format
from ..quantizers.methods import METHODS, Evidence, Method
from ..quantizers.packed import PackedTensor
from .contract import Contract
from .toys import drawn

FORMATS = ("int1-g32", "int2-g64-asym", "int3-gc", "int4-gt-asym", "int8-g256", "q4_k", "bf16")
WORST = 1.5  # no method may lose more than this times what rounding to nearest loses


def cost(packed: PackedTensor, weight: Tensor, evidence: Evidence) -> float:
    """Mean squared error of the outputs, ``tr(E H E^T)`` with H [cols, cols] of the evidence."""
    error = (packed.dequantize() - weight).double()
    assert evidence.hessian is not None
    return float(torch.einsum("rc,cd,rd->", error, evidence.hessian.double(), error))


def of_moments(moments: Tensor) -> Evidence:
    """Evidence by which errors cost ``tr(E H E^T)``, whichever of its fields a method needs."""
    return Evidence(hessian=moments, fisher=moments)


def same(first: PackedTensor, second: PackedTensor) -> bool:
    """Whether two packed weights are stored as the same bytes."""
    pairs = zip(first.tensors.values(), second.tensors.values(), strict=True)
    return first.fmt == second.fmt and all(torch.equal(a, b) for a, b in pairs)


class MethodContract(Contract):
    """Packed codes of the format that was asked for, whose errors the evidence hardly minds."""

    @pytest.fixture
    def weight(self) -> Tensor:
        """[24, 160]: the last group of 64 is short, and 256 are more than a row."""
        return drawn((24, 160), 0) / 16

    @pytest.fixture
    def evidence(self) -> Evidence:
        """Of 500 inputs whose columns go together, as those of networks do."""
        inputs = drawn((500, 160), 1).cumsum(1) / 8 + drawn((500, 160), 2)
        return of_moments(inputs.T @ inputs / len(inputs))

    def plugin(self, name: str) -> Method:
        """The method."""
        return METHODS.get(name)

    @pytest.mark.parametrize("spec", FORMATS)
    def test_gives_the_format_asked_for(
        self, name: str, spec: str, weight: Tensor, evidence: Evidence
    ) -> None:
        """With and without evidence; the weight stays as it is, the bytes are those counted."""
        fmt, before = Format.parse(spec), weight.clone()
        for known in (evidence, Evidence()):
            packed = self.plugin(name)(weight, fmt, known)
            assert isinstance(packed, PackedTensor)
            assert packed.fmt == fmt
            assert packed.shape == tuple(weight.shape)
            assert packed.nbytes == fmt.stored_bytes(packed.shape)
            assert packed.dequantize().isfinite().all()
            assert torch.equal(weight, before)

    @pytest.mark.parametrize("spec", FORMATS)
    def test_loses_no_more_than_rounding_to_nearest(
        self, name: str, spec: str, weight: Tensor, evidence: Evidence
    ) -> None:
        """By the evidence's own quadratic; a method that works from it loses less."""
        fmt = Format.parse(spec)
        nearest = cost(METHODS.get("rtn")(weight, fmt, evidence), weight, evidence)
        found = cost(self.plugin(name)(weight, fmt, evidence), weight, evidence)
        assert found <= WORST * nearest
        rounds = METHODS.trait(name, "rounds", lambda _: True)
        if METHODS.trait(name, "needs") and rounds(fmt) and not fmt.floating:
            assert found < nearest

    @pytest.mark.parametrize("group", ["g32", "g64-asym", "gc", "gt-asym"])
    def test_more_bits_lose_less(
        self, name: str, group: str, weight: Tensor, evidence: Evidence
    ) -> None:
        """From 2 to 8 bits, by a factor of a hundred and more."""
        costs = []
        for bits in (2, 3, 4, 5, 6, 8):
            packed = self.plugin(name)(weight, Format.parse(f"int{bits}-{group}"), evidence)
            costs.append(cost(packed, weight, evidence))
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] < 1e-2 * costs[0]

    @pytest.mark.parametrize("spec", FORMATS)
    def test_repeats(self, name: str, spec: str, weight: Tensor, evidence: Evidence) -> None:
        """Bit for bit, whether the evidence is new or another format was rounded with it."""
        fmt = Format.parse(spec)
        first, again = (self.plugin(name)(weight, fmt, evidence) for _ in range(2))
        assert same(first, again)
        fresh = replace(evidence, kept={})
        assert same(first, self.plugin(name)(weight, fmt, fresh))

    @pytest.mark.parametrize("spec", ["int3-g64-asym", "int2-gc", "q4_k", "bf16"])
    def test_traits_say_what_is_true(
        self, name: str, spec: str, weight: Tensor, evidence: Evidence
    ) -> None:
        """A grid gives the same codes again, what is not rounded is rounded to nearest, ..."""
        fmt, packed = Format.parse(spec), self.plugin(name)(weight, Format.parse(spec), evidence)
        needs = set(METHODS.trait(name, "needs", ()))
        assert needs <= {field.name for field in fields(Evidence)} - {"kept"}
        if grid := METHODS.trait(name, "grid"):
            assert same(packed, PackedTensor.pack(weight, fmt, grid(weight, fmt)))
        rounds = METHODS.trait(name, "rounds", lambda _: True)
        if not rounds(fmt):
            assert same(packed, METHODS.get("rtn")(weight, fmt, evidence))
        if not needs:
            assert same(packed, self.plugin(name)(weight, fmt, Evidence()))

    @pytest.mark.parametrize("spec", ["int2-g32", "int4-g64-asym", "int3-gt-asym"])
    def test_copes_with_odd_weights(self, name: str, spec: str) -> None:
        """One row, one column, nothing but zeros, one large entry, entries that vanish."""
        fmt = Format.parse(spec)
        single, column = drawn((1, 40), 3), drawn((40, 1), 4)
        outlier, tiny = drawn((8, 96), 5), 1e-12 * drawn((8, 96), 6)
        outlier[3, 7] = 1e3
        for weight in (single, column, torch.zeros(8, 96), outlier, tiny):
            evidence = of_moments(torch.eye(weight.shape[1]))
            found = self.plugin(name)(weight, fmt, evidence).dequantize()
            assert found.shape == weight.shape
            assert (found - weight).abs().max() <= weight.abs().max()

    @pytest.mark.parametrize("spec", ["int2-g32", "int4-g64-asym", "int3-gc"])
    def test_copes_with_odd_evidence(self, name: str, spec: str, weight: Tensor) -> None:
        """Columns that nothing reached, inputs that are all alike, blocks of rows of their own."""
        fmt, cols = Format.parse(spec), weight.shape[1]
        inputs = drawn((500, cols), 7)
        inputs[:, 5:20] = 0
        unreached = of_moments(inputs.T @ inputs / len(inputs))
        alike = of_moments(torch.ones(cols, cols))
        nearest = METHODS.get("rtn")(weight, fmt, Evidence())
        for evidence in (unreached, alike):
            packed = self.plugin(name)(weight, fmt, evidence)
            assert cost(packed, weight, evidence) <= WORST * cost(nearest, weight, evidence)

    @pytest.mark.parametrize("spec", ["int2-g32", "int4-g64-asym", "int3-gc"])
    def test_blocks_of_rows_have_inputs_of_their_own(
        self, name: str, spec: str, weight: Tensor, evidence: Evidence
    ) -> None:
        """Second moments [2, cols, cols] mean: half of the rows each."""
        fmt, half = Format.parse(spec), len(weight) // 2
        assert evidence.hessian is not None
        hessians = torch.stack([evidence.hessian, evidence.hessian.flip(0, 1)])
        whole = self.plugin(name)(weight, fmt, of_moments(hessians)).dequantize()
        for i, rows in enumerate((slice(0, half), slice(half, None))):
            part = of_moments(hessians[i])
            alone = self.plugin(name)(weight[rows], fmt, part).dequantize()
            torch.testing.assert_close(whole[rows], alone)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_refuses_weights_that_are_no_numbers(
        self, name: str, bad: float, weight: Tensor, evidence: Evidence
    ) -> None:
        """Rather than store something else."""
        weight[2, 3] = bad
        with pytest.raises(ValueError, match=r"nan|inf"):
            self.plugin(name)(weight, Format.parse("int4-g32"), evidence)

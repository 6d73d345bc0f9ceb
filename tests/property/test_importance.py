"""Scales fitted to what errors cost: less of that cost than without knowing it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.quantizers.families.integers import Integers
from bitplan.quantizers.format import Format, fit
from bitplan.quantizers.grid import Grid, render
from bitplan.quantizers.lines import salience
from bitplan.quantizers.methods.rtn import fit_grid
from bitplan.quantizers.packed import PackedTensor

NAMES = [
    *("int1-g32", "int2-g64-asym", "int3-g64", "int4-gc-asym", "int5-g128", "int8-gt-asym"),
    *("nf4-g64", "nf4-gc", "nl2-g64", "vq2-g64", "int3-g64+lr4"),
    *("q4_1", "q5_1", "iq4_nl", "mxfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
]
formats = st.sampled_from([Format.parse(name) for name in NAMES])
seeds = st.integers(0, 2**32)


def drawn(seed: int, rows: int = 24, cols: int = 300) -> tuple[Tensor, Tensor]:
    """A weight, and importance of its columns that spans orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) / 16
    return weight, torch.randn(cols, generator=generator).mul_(1.5).exp_()


def error(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    return (render(weight, fmt, fit_grid(weight, fmt, importance)) - weight).square()


@given(formats, seeds, st.sampled_from([1e-9, 1.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_what_is_important_is_rounded_better(fmt: Format, seed: int, size: float) -> None:
    weight, importance = drawn(seed)
    known = (error(weight, fmt, importance * size) * importance).sum()
    least = 1 if fmt.group_size > 0 else 1.001  # one scale has little to choose from
    assert known < least * (error(weight, fmt) * importance).sum()
    if not fmt.rank:  # no matter whether columns are named once, or for every row
        entries = importance.expand(weight.shape).contiguous()
        assert torch.equal(
            error(weight, fmt, entries * size), error(weight, fmt, importance * size)
        )


@given(formats, seeds)
@settings(max_examples=40, deadline=None)
def test_equal_importance_is_the_plain_squared_error(fmt: Format, seed: int) -> None:
    weight, _ = drawn(seed, 64)
    plain = error(weight, fmt, torch.ones(300)).sum()
    assert plain < 1.005 * error(weight, fmt).sum()  # both searches are local


@given(formats, seeds)
@settings(max_examples=40, deadline=None)
def test_importance_of_entries_counts_row_by_row(fmt: Format, seed: int) -> None:
    weight, importance = drawn(seed)
    entries = torch.stack([importance.roll(row) for row in range(len(weight))])
    known = (error(weight, fmt, entries) * entries).sum()
    assert known < (1 if fmt.group_size > 0 else 1.001) * (error(weight, fmt) * entries).sum()


@given(formats, seeds)
@settings(max_examples=40, deadline=None)
def test_what_was_fitted_is_stored_bit_for_bit(fmt: Format, seed: int) -> None:
    weight, importance = drawn(seed)
    weight[3] = 0
    importance[40:120] = 0
    fitted = fit_grid(weight, fmt, importance)
    whole = PackedTensor.pack(weight, fmt, fitted).dequantize()
    assert torch.equal(render(weight, fmt, fitted), whole)
    assert whole.isfinite().all()
    assert torch.equal(whole[3], weight[3]) or fmt.rank
    assert (whole - weight).abs().max() <= weight.abs().max()


@pytest.mark.parametrize("spec", NAMES)
def test_groups_of_no_importance_are_fitted_as_if_nothing_were_known(spec: str) -> None:
    fmt, (weight, importance) = Format.parse(spec), drawn(0, cols=768)
    importance[:512] = 0
    if fmt.group_size <= 0:
        importance[:] = 0
    here = slice(0, 512 if fmt.group_size > 0 else 768)
    if not fmt.rank:  # of low rank a correction makes up for errors elsewhere
        assert (
            error(weight, fmt, importance)[:, here].sum() < 1.05 * error(weight, fmt)[:, here].sum()
        )


@pytest.mark.parametrize("spec", ["int3-g64", "nf4-g64", "iq4_nl", "q3_k"])
def test_an_outlier_of_no_importance_is_cut_off(spec: str) -> None:
    fmt, (weight, _) = Format.parse(spec), drawn(4, cols=512)
    weight.clamp_(-0.15, 0.15)
    importance = torch.ones(512)
    importance[:: fmt.group_size] = 0
    alone = (error(weight, fmt, importance) * importance).sum()
    weight[:, :: fmt.group_size] = 0.375  # clipped to as little as 0.35 of them
    assert (error(weight, fmt, importance) * importance).sum() < 1.25 * alone


def test_without_importance_magnitudes_count() -> None:
    weight, importance = torch.tensor([[3.0, -4.0], [0.0, 1.0]]), torch.tensor([[1.0, 3], [0, 0]])
    own = torch.tensor([[3 + 12.5**0.5, 4 + 12.5**0.5], [0.5**0.5, 1 + 0.5**0.5]])
    assert torch.allclose(salience(weight), own)
    counts = salience(weight, importance)
    assert counts[0].tolist() == [0.5, 1.5]
    assert torch.allclose(counts[1] / counts[1].sum(), own[1] / own[1].sum())


def test_a_family_without_the_parameter_is_fitted_without(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = drawn(1)
    fmt, own = Format.parse("int3-g64"), Integers.fit
    expected = fit(weight, fmt)
    assert expected is not None

    def plain(self: Integers, weight: Tensor, fmt: Format) -> Grid:
        return own(self, weight, fmt)

    monkeypatch.setattr(Integers, "fit", plain)
    found = fit_grid(weight, fmt, importance)
    assert torch.equal(render(weight, fmt, found), render(weight, fmt, expected))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_importance_that_is_none_is_refused(bad: float) -> None:
    weight, importance = drawn(2)
    importance[7] = bad
    with pytest.raises(ValueError, match="diagonal of a curvature"):
        fit_grid(weight, Format.parse("int3-g64"), importance)


@pytest.mark.parametrize("spec", ["int3-g64", "nf4-g64", "q4_k"])
def test_importance_of_another_matrix_is_refused(spec: str) -> None:
    weight, importance = drawn(3)
    with pytest.raises(ValueError, match=r"\[299\] does not go with a weight \[24, 300\]"):
        fit_grid(weight, Format.parse(spec), importance[1:])

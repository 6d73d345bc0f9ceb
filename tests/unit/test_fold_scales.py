"""Scales to fold: AWQ's exponents, and SINQ's factors."""

from __future__ import annotations

import pytest
import torch

from bitplan.models.fold_tracing import find_folds
from bitplan.models.folds import Fold
from bitplan.models.samples import calibration_samples
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.sensitivity import folding
from bitplan.sensitivity.folding import awq_scale, check_fold, fold_scales, sinq_scale

FOLD = Fold("norm", ("up", "gate"), channels=64)
INT3 = Format.parse("int3-g64-asym")


def matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(48, 64, generator=generator) for _ in range(2)]


def spread(scale: torch.Tensor) -> float:
    return float(scale.log().std())


def test_columns_with_large_inputs_are_scaled_up_where_errors_cost_their_squares() -> None:
    magnitude = torch.ones(64)
    magnitude[:4] = 30.0
    scale = awq_scale(FOLD, matrices(), magnitude, magnitude.square(), INT3)
    assert scale[:4].min() > 1.5 * scale[4:].max()
    assert scale.max() * scale.min() == pytest.approx(1, rel=1e-5)
    flat = awq_scale(FOLD, matrices(), magnitude, torch.ones(64), INT3)
    assert torch.equal(flat, torch.ones(64))  # errors cost the same everywhere: exponent 0


def test_channels_that_several_columns_read_have_one_scale() -> None:
    heads = tuple(j % 32 for j in range(64))
    fold = Fold("v", ("o",), channels=32, columns=heads)
    magnitude = torch.ones(64)
    magnitude[0] = magnitude[32] = 30.0  # both of channel 0
    scale = awq_scale(fold, matrices()[:1], magnitude, magnitude.square(), INT3)
    assert len(scale) == 32 and int(scale.argmax()) == 0
    assert len(sinq_scale(fold, matrices()[:1])) == 32


def test_factors_even_out_the_deviations_of_columns() -> None:
    columns = torch.logspace(-0.7, 0.7, 64, base=10)
    uneven = [matrix * columns for matrix in matrices()]
    scale = sinq_scale(FOLD, uneven)
    before, after = (torch.cat([m * s for m in uneven]).std(0) for s in (1.0, scale))
    assert before.max() / before.min() > 20
    assert after.max() / after.min() < 2
    empty = [matrix * (torch.arange(64) > 0) for matrix in matrices()]  # a channel without weights
    assert sinq_scale(FOLD, empty).isfinite().all()


def test_feedback_leaves_less_to_gain(tiny: LoadedModel) -> None:
    samples = calibration_samples(tiny, "prose", 24, 32, 0)
    folds = find_folds(tiny, samples.batches[0])
    formats = (INT3, Format.parse("bf16"))
    nearest = fold_scales(tiny, folds, "awq", samples, formats, "rtn")
    feedback = fold_scales(tiny, folds, "awq", samples, formats, "gptq")
    assert nearest.keys() == feedback.keys() == {fold.source for fold in folds}
    for scale in (*nearest.values(), *feedback.values()):
        assert (scale > 0).all() and scale.isfinite().all()
    total = [sum(map(spread, scales.values())) for scales in (nearest, feedback)]
    assert total[1] < total[0]


def test_inputs_are_summed_in_as_many_passes_as_there_is_room(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = calibration_samples(tiny, "prose", 4, 32, 0)
    folds = find_folds(tiny, samples.batches[0])
    whole = fold_scales(tiny, folds, "awq", samples, (INT3,), "gptq")
    monkeypatch.setattr(folding, "LIMIT", 1)  # one fold at a time
    for source, scale in fold_scales(tiny, folds, "awq", samples, (INT3,), "gptq").items():
        assert torch.equal(scale, whole[source])


def test_an_unknown_fold_is_named() -> None:
    check_fold("none")
    with pytest.raises(ValueError, match=r"'sink'\. Did you mean 'sinq'\? Available: none, awq"):
        check_fold("sink")

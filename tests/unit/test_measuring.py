"""Held-out figures: measured once, kept, and used to pick the plan that ships."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bitplan._base.progress import Reporter
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.held_out import HeldOut, with_cache
from bitplan.models.find import find_units
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, evaluation_samples
from bitplan.models.units import UnitInfo
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.methods import Evidence
from bitplan.search.goals import Asked, ModelFacts
from bitplan.search.goals.budget import OfBudget
from bitplan.search.plan import BudgetRef, KVCache, Plan, plan_key
from bitplan.sensitivity.provenance import ModelRef

WITHIN = OfBudget(Asked(budget="1000B"), ModelFacts("tiny", True))
FORMATS = ("int2-g32-asym", "int4-g32-asym", "int8-g32-asym")


@pytest.fixture
def samples(tiny: LoadedModel) -> Samples:
    return evaluation_samples(tiny, tokens=256, length=32, batch_tokens=128)


@pytest.fixture
def units(tiny: LoadedModel) -> tuple[UnitInfo, ...]:
    return find_units(tiny.module, include=("*.mlp.*",))


def plan(units: tuple[UnitInfo, ...], fmt: str, size: int, limit: int = 1000) -> Plan:
    return Plan(
        model=ModelRef(id="tiny", sha256="ab"),
        assignments={name: fmt for unit in units for name in unit.modules},
        budget=BudgetRef(text=f"{limit}B", bytes=limit),
        bytes=size,
        weights=100,
        bpw=8 * size / 100,
        predicted_kl=0.1,
        predicted_kl_stderr=0.01,
        lower_bound_kl=0.1,
        gap=0.0,
        metric="fisher",
        solver="certified",
        rounding="rtn",
        calibration={},
        versions={},
        created="2026-01-01T00:00:00Z",
    )


def held_out(
    model: LoadedModel, units: tuple[UnitInfo, ...], samples: Samples, run: Path
) -> HeldOut:
    renderer = Renderer(model.module, units)
    return HeldOut(model, renderer, samples, RunFolder(run), Reporter(quiet=True))


def break_model(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model must not run")

    monkeypatch.setattr(model.module, "forward", fail)


def direct_kl(
    model: LoadedModel, units: tuple[UnitInfo, ...], samples: Samples, plan: Plan
) -> float:
    from bitplan.quantizers.format import Format

    renderer = Renderer(model.module, units)
    assignment = {name: Format.parse(fmt) for name, fmt in plan.assignments.items()}
    total = []
    with torch.no_grad():
        for batch in samples.batches:
            log_p = model.logits(batch).log_softmax(-1).double()
            with renderer.applied(assignment):
                log_q = model.logits(batch).log_softmax(-1).double()
            total.append((log_p.exp() * (log_p - log_q)).sum(-1).mean(1))
    return float(torch.cat(total).mean())


def test_figures_are_right_and_measured_once(
    tiny: LoadedModel,
    units: tuple[UnitInfo, ...],
    samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = {fmt: plan(units, fmt, 10) for fmt in FORMATS}
    first = held_out(tiny, units, samples, tmp_path).measure(plans)
    for fmt, found in first.items():
        assert found.mean_kl == pytest.approx(direct_kl(tiny, units, samples, plans[fmt]), rel=1e-4)
        assert found.tokens == 256 and found.perplexity is not None
    assert first[FORMATS[0]].mean_kl > first[FORMATS[1]].mean_kl > first[FORMATS[2]].mean_kl
    break_model(tiny, monkeypatch)
    later = held_out(tiny, units, samples, tmp_path)
    again = later.measure({"renamed": plans[FORMATS[1]]})["renamed"]
    np.testing.assert_array_equal(again.kl, first[FORMATS[1]].kl)
    np.testing.assert_array_equal(again.nll, first[FORMATS[1]].nll)
    assert later.ppl_original is not None
    with pytest.raises(AssertionError, match="must not run"):
        later.measure({"new": plan(units, "int5-g32-asym", 10)})


@pytest.mark.parametrize("damage", ["", "{trunc", "[]", '{"text_sha256": "other", "plans": {}}'])
def test_a_damaged_file_or_other_text_is_measured_again(
    tiny: LoadedModel,
    units: tuple[UnitInfo, ...],
    samples: Samples,
    tmp_path: Path,
    damage: str,
) -> None:
    path = RunFolder(tmp_path).measurements
    path.write_text(damage)
    held_out(tiny, units, samples, tmp_path).measure({"a": plan(units, FORMATS[1], 10)})
    found = json.loads(path.read_text())
    assert found["text_sha256"] == samples.sha256
    assert len(found["plans"]) == 1


def test_codes_from_other_data_are_measured_again(
    tiny: LoadedModel, units: tuple[UnitInfo, ...], samples: Samples, tmp_path: Path
) -> None:
    class Given:
        def __init__(self, key: str) -> None:
            self.key = key

        def gather(self, names: Sequence[str]) -> Iterator[Mapping[str, Evidence]]:
            yield dict.fromkeys(names, Evidence())

    def known(key: str) -> HeldOut:
        renderer = Renderer(tiny.module, units, "gptq")
        renderer.store.evidence = Given(key)
        quiet = Reporter(quiet=True)
        return HeldOut(tiny, renderer, samples, RunFolder(tmp_path), quiet)

    made = plan(units, FORMATS[0], 100)
    known("some").measure({"made": made})
    assert plan_key(made) in known("some")._known.plans
    assert not known("others")._known.plans


def test_the_best_plan_that_fits_is_shipped_with_the_others_as_baselines(
    tiny: LoadedModel, units: tuple[UnitInfo, ...], samples: Samples, tmp_path: Path
) -> None:
    sizes = {"int2-g32-asym": 500, "int4-g32-asym": 1000, "int8-g32-asym": 1001}
    plans = {fmt: plan(units, fmt, size) for fmt, size in sizes.items()}
    best = held_out(tiny, units, samples, tmp_path).best(plans, WITHIN)
    assert best.assignments == plans["int4-g32-asym"].assignments
    assert best.measured is not None
    assert best.measured.text_sha256 == samples.sha256
    assert best.measured.tokens == 256
    baselines = {baseline.name: baseline for baseline in best.baselines}
    assert set(baselines) == {"int2-g32-asym", "int8-g32-asym"}
    for baseline in baselines.values():
        assert baseline.difference == pytest.approx(baseline.kl - best.measured.kl)
    assert baselines["int8-g32-asym"].difference < 0 < baselines["int2-g32-asym"].difference


def test_a_plan_with_a_cache_is_another_plan(
    tiny: LoadedModel, units: tuple[UnitInfo, ...], samples: Samples, tmp_path: Path
) -> None:
    weights = plan(units, FORMATS[2], 500)
    cache = {
        bits: KVCache(
            bits={f"model.layers.{i}": bits for i in range(2)},
            context=64,
            batch=1,
            bytes=500,
            predicted_kl=0.0,
        )
        for bits in (2, 4, 16)
    }
    cached = {str(b): weights.model_copy(update={"kv_cache": c}) for b, c in cache.items()}
    both = held_out(tiny, units, samples, tmp_path)
    found = both.measure({"weights": weights, **cached})
    assert found["2"].mean_kl > found["4"].mean_kl > found["weights"].mean_kl
    assert found["16"].mean_kl == pytest.approx(found["weights"].mean_kl, rel=1e-3)
    over = weights.model_copy(update={"kv_cache": cache[4].model_copy(update={"bytes": 501})})
    assert both.best({"over": over, "2": cached["2"]}, WITHIN).kv_cache == cache[2]


def test_no_cache_is_the_same_run(tiny: LoadedModel) -> None:
    assert with_cache(tiny, tiny.logits, None) == tiny.logits


def test_the_plan_and_its_best_rival_are_measured_on_a_second_text(
    tiny: LoadedModel, units: tuple[UnitInfo, ...], samples: Samples, tmp_path: Path
) -> None:
    sizes = {"int2-g32-asym": 500, "int4-g32-asym": 1000, "int8-g32-asym": 1001}
    plans = {f"uniform {fmt}": plan(units, fmt, size) for fmt, size in sizes.items()}
    mixed = plan(units, "int8-g32-asym", 900)
    plans["mixed"] = mixed = mixed.model_copy(
        update={"assignments": mixed.assignments | {units[0].modules[0]: "int6-g32-asym"}}
    )
    uniform = {name: name.removeprefix("uniform ") for name in plans if name != "mixed"}
    shipped = held_out(tiny, units, samples, tmp_path).best(plans, WITHIN, uniform)
    assert shipped.assignments == mixed.assignments
    code = evaluation_samples(tiny, "code", tokens=128, length=32)
    run, quiet = RunFolder(tmp_path), Reporter(quiet=True)
    file = run.measurements_also
    second = HeldOut(tiny, Renderer(tiny.module, units), code, run, quiet, file)
    also = second.beside(shipped, plans)
    assert (also.text, also.tokens, also.text_sha256) == ("code", 128, code.sha256)
    assert also.kl == pytest.approx(direct_kl(tiny, units, code, mixed), rel=1e-4)
    assert also.rival == "int4-g32-asym", "int8 is over the budget, int2 is worse"
    rival = direct_kl(tiny, units, code, plans["uniform int4-g32-asym"])
    assert also.rival_kl == pytest.approx(rival, rel=1e-4)
    assert also.difference == pytest.approx(rival - also.kl, rel=1e-3)
    assert also.difference_stderr is not None and also.difference_stderr > 0
    assert len(json.loads(file.read_text())["plans"]) == 2, "not all of them"
    alone = second.beside(shipped.model_copy(update={"baselines": []}), plans)
    assert (alone.kl, alone.rival, alone.rival_kl) == (also.kl, None, None)


def test_a_plan_far_behind_is_not_measured_on_everything(
    tiny: LoadedModel, units: tuple[UnitInfo, ...], tmp_path: Path
) -> None:
    samples = evaluation_samples(tiny, tokens=1024, length=32, batch_tokens=128)
    plans = {fmt: plan(units, fmt, size) for size, fmt in enumerate(FORMATS, 998)}
    apart = held_out(tiny, units, samples, tmp_path / "all").measure(plans)
    contest = held_out(tiny, units, samples, tmp_path)
    shipped = contest.best(plans, WITHIN, {fmt: fmt for fmt in FORMATS})
    assert shipped.measured is not None and shipped.measured.tokens == 1024
    assert shipped.assignments == plans["int8-g32-asym"].assignments
    found = {b.format: b for b in shipped.baselines}
    last = found["int2-g32-asym"]
    sequences = 8  # the first batches with enough of them to say so
    assert last.tokens == sequences * 32 and last.ppl is None
    behind = apart["int2-g32-asym"].kl[:sequences] - apart["int8-g32-asym"].kl[:sequences]
    assert last.difference == pytest.approx(behind.mean(), rel=1e-5)
    assert last.kl == pytest.approx(apart["int2-g32-asym"].kl[:sequences].mean(), rel=1e-5)
    assert len(contest.measure({"int2": plans["int2-g32-asym"]})["int2"].kl) == samples.count


def test_whoever_was_dropped_is_measured_on_when_the_leader_is_no_better(
    tiny: LoadedModel, units: tuple[UnitInfo, ...], tmp_path: Path
) -> None:
    samples = evaluation_samples(tiny, tokens=1024, length=32, batch_tokens=128)
    some = {fmt: plan(units, fmt, 999) for fmt in FORMATS[:2]}
    held_out(tiny, units, samples, tmp_path).best(
        some | {"int8": plan(units, FORMATS[2], 999)}, WITHIN
    )
    later = held_out(tiny, units, samples, tmp_path).best(some, WITHIN)  # int4 leads now
    assert later.measured is not None
    assert later.measured.tokens == samples.count * 32
    assert later.assignments == some[FORMATS[1]].assignments


def test_a_better_plan_over_the_budget_takes_no_one_out_of_the_running(
    tiny: LoadedModel, units: tuple[UnitInfo, ...], tmp_path: Path
) -> None:
    samples = evaluation_samples(tiny, tokens=1024, length=32, batch_tokens=128)
    sizes = {"int2-g32-asym": 500, "int4-g32-asym": 1000, "int8-g32-asym": 1001}
    plans = {fmt: plan(units, fmt, size) for fmt, size in sizes.items()}
    shipped = held_out(tiny, units, samples, tmp_path).best(plans, WITHIN)
    assert shipped.assignments == plans["int4-g32-asym"].assignments
    assert shipped.measured is not None and shipped.measured.tokens == 1024
    tokens = {b.name: b.tokens for b in shipped.baselines}
    assert tokens == {"int2-g32-asym": 256, "int8-g32-asym": None}

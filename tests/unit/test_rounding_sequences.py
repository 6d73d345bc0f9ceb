"""Sequences that weights are rounded by: others than those of prices, the guard and validation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitplan._base.progress import Reporter
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.materialize import planned_units, quantize
from bitplan.jobs.prepare import prepare
from bitplan.jobs.renderings import plan_renderer, recorded_samples
from bitplan.jobs.search import run_profile, run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.jobs.truth import guarded
from bitplan.models.load import load_model, load_tokenizer
from bitplan.models.rounding_samples import in_halves, rounding_samples
from bitplan.models.samples import Samples, calibration_samples, samples_from_batches
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.methods.gptq import has_own_codes
from bitplan.search.plan import Plan
from bitplan.search.solve import solve
from bitplan.sensitivity.estimate import profile
from bitplan.sensitivity.statistics import Statistics
from bitplan.testing.toys import toy_of
from bitplan.tests.unit.test_statistics import count_passes, curved

QUIET = Reporter(quiet=True)
FORMATS = ("int2-g64", "int4-g64", "bf16")


def settings(model: Path, rounding: str, **changed: object) -> ProfileSettings:
    given: dict[str, object] = {"sequences": 8, "rounding_sequences": 6, "length": 32}
    given |= {"formats": FORMATS, "rounding": rounding, "calibration": "builtin"} | changed
    return ProfileSettings(str(model), **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def method() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS._found, "curved", curved)
        patch.setitem(
            METHODS._traits, "curved", {"needs": {"fisher"}, "rounds": has_own_codes, "grid": None}
        )
        yield


@pytest.fixture(scope="module")
def searched(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    run = tmp_path_factory.mktemp("runs") / "curved"
    search = SearchSettings(budget="3.9bpw", refine=1, guard=8, eval_tokens=256, bootstrap=0)
    return run, run_search(settings(tiny_folder, "curved"), search, run, QUIET)


def rows(samples: Samples) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    for batch in samples.batches:
        assert isinstance(batch, Tensor)
        found |= {tuple(row) for row in batch.tolist()}
    return found


@pytest.mark.parametrize("rounding", ["rtn", "gptq", "curved"])
def test_prices_rounding_and_guard_see_different_text(
    tiny: LoadedModel, tiny_folder: Path, rounding: str
) -> None:
    given = settings(tiny_folder, rounding)
    work = prepare(given, QUIET)
    plain = calibration_samples(tiny, sequences=8, length=32)
    assert work.samples.sha256 == plain.sha256  # those of prices are always the same
    _, apart = guarded(tiny, given, work.samples, 8)
    everything = calibration_samples(tiny, sequences=22, length=32)
    order = [tuple(row) for batch in everything.batches for row in batch.tolist()]  # type: ignore[union-attr]
    evidence = work.renderer.store.evidence
    if rounding == "rtn":
        assert evidence is None
        assert "rounding_sequences" not in work.provenance.calibration
        assert rows(apart) == set(order[8:16])
        return
    seen: Samples = evidence._samples()  # type: ignore[union-attr]
    assert rows(seen) == set(order[8:14])
    assert rows(apart) == set(order[14:22])
    calibration = work.provenance.calibration
    assert calibration["rounding_sequences"] == 6
    assert calibration["rounding_sha256"] == seen.sha256
    assert work.provenance.evidence is not None
    assert work.provenance.evidence["data_sha256"] == seen.sha256
    assert work.provenance.evidence["revision"]
    assert "evidence.revision" in work.provenance.decisive()


def test_a_text_that_is_too_short_for_both(tiny: LoadedModel, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The model stores a scale for every row of every weight. " * 40)
    held = len(tiny.workload.tokenizer(text.read_text())["input_ids"]) // 32
    assert rounding_samples(tiny, str(text), 3, 32, priced=held - 3).count == 3
    with pytest.raises(
        ValueError,
        match=rf"holds {held} sequences of 32 tokens, {held + 1} are needed.*{held - 3} of them are"
        r" for prices \(--sequences\) and 4 others for rounding: a lower --rounding-sequences",
    ):
        rounding_samples(tiny, str(text), 4, 32, priced=held - 3)
    with pytest.raises(ValueError, match=r"No text file") as caught:
        rounding_samples(tiny, "gone.txt", 4, 32, priced=2)
    assert "--rounding-sequences" not in str(caught.value)


def test_batches_of_ones_own_are_halved() -> None:
    model = toy_of(nn.Linear(4, 3))
    batches = [torch.full((2, 4), float(i)) for i in range(5)]
    samples = samples_from_batches(batches, model, "x", 7)
    priced, seen = in_halves(samples)
    assert all(a is b for a, b in zip(seen.batches, batches[:2], strict=True))
    assert all(a is b for a, b in zip(priced.batches, batches[2:], strict=True))
    assert len({samples.sha256, priced.sha256, seen.sha256}) == 3
    single = samples_from_batches(batches[:1], model, "x", 7)
    assert in_halves(single) == (single, single)


def test_a_profile_from_python(tiny: LoadedModel) -> None:
    table = profile(tiny, None, FORMATS, rounding="curved", rounding_sequences=5)
    expected = rounding_samples(tiny, "mixture", sequences=5, priced=96)
    assert table.provenance.calibration["rounding_sha256"] == expected.sha256
    nearest = profile(tiny, None, FORMATS)
    assert nearest.provenance.evidence is None
    own = list(calibration_samples(tiny, sequences=8, length=32, batch_tokens=64).batches)
    table = profile(tiny, own, FORMATS, rounding="gptq")
    assert table.provenance.calibration["sequences"] == 4
    assert table.provenance.calibration["rounding_sequences"] == 4


def test_choices_are_recorded(searched: tuple[Path, Plan], tiny_folder: Path) -> None:
    run, plan = searched
    assert plan.evidence is not None
    assert plan.evidence["needs"] == ["fisher"]
    mixtures = plan.evidence["mixtures"]
    assert mixtures.keys() >= {"mlp.down_proj", "self_attn.q_proj", "model.embed_tokens"}
    for mixture in mixtures.values():
        assert mixture.keys() == {"token", "plain", "damping"}
    for name in ("plan.json", "profile.json"):
        text = json.loads((run / name).read_text())
        assert (text.get("evidence") or text["provenance"]["evidence"])["mixtures"] == mixtures
    assert Plan.load(run / "plan.json") == plan
    older = json.loads((run / "plan.json").read_text())
    del older["evidence"]
    assert "evidence" not in Plan.parse(json.dumps(older), "x").model_dump()


def test_a_second_run_gathers_nothing(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path
) -> None:
    run, _ = searched
    copied = RunFolder(tmp_path / "run")
    copied.path.mkdir()
    shutil.copytree(RunFolder(run).statistics, copied.statistics)
    given = settings(tiny_folder, "curved", formats=("int3-g64", "bf16"))
    work = prepare(given, QUIET, copied)
    evidence = work.renderer.store.evidence
    assert isinstance(evidence, Statistics)
    passes = count_passes(evidence)
    work.renderer.fit(work.formats)
    assert not passes
    other = settings(tiny_folder, "curved", rounding_sequences=7)
    evidence = prepare(other, QUIET, copied).renderer.store.evidence
    assert isinstance(evidence, Statistics)
    passes = count_passes(evidence)
    list(evidence.gather(["model.layers.0.mlp.up_proj"]))
    assert passes


def test_a_plan_without_its_run_is_rounded_again(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path
) -> None:
    run, plan = searched
    shutil.copy(run / "plan.json", tmp_path / "plan.json")
    quantize(tmp_path / "plan.json", tmp_path / "packed")  # the codes are compared by hash
    wrong = plan.calibration | {"rounding_sha256": "0" * 64}
    with pytest.raises(ValueError, match=r"on 6 sequences of 'builtin'.*is another text"):
        quantize(plan.model_copy(update={"calibration": wrong}), tmp_path / "other")


def test_a_module_without_tokenizer_is_rounded_as_its_plan_says(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = searched
    module = load_model(str(tiny_folder), "cpu").module
    quantize(plan, tmp_path / "packed", module)  # the codes are compared by hash
    monkeypatch.setattr("bitplan.jobs.renderings.load_tokenizer", lambda _: None)
    with pytest.raises(ValueError, match="no tokenizer is found under the name"):
        quantize(plan, tmp_path / "other", module)


def test_a_tokenizer_that_needs_another_package_is_none(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def fail(*_: object, **__: object) -> None:
        raise ImportError("sentencepiece")

    assert load_tokenizer(str(tiny_folder)) is not None
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    assert load_tokenizer(str(tiny_folder)) is None


def test_a_plan_that_names_no_rounding_sequences_was_rounded_by_those_of_prices(
    searched: tuple[Path, Plan], tiny_folder: Path
) -> None:
    _, plan = searched
    model = load_model(str(tiny_folder), "cpu")
    assert recorded_samples(plan, model).sha256 == plan.calibration["rounding_sha256"]
    kept = {k: v for k, v in plan.calibration.items() if not k.startswith("rounding")}
    older = plan.model_copy(update={"calibration": kept, "codes_sha256": None, "evidence": None})
    assert recorded_samples(older, model).sha256 == plan.calibration["sha256"]
    renderer = plan_renderer(older, model, planned_units(model.module, older))
    assert isinstance(renderer.store.evidence, Statistics)


def test_a_finished_profile_is_found_again(tiny_folder: Path, tmp_path: Path) -> None:
    given = settings(tiny_folder, "curved", include=("model.layers.0.*",))
    first = run_profile(given, tmp_path / "run", QUIET)
    again = run_profile(given, tmp_path / "run", QUIET)
    assert again.provenance == first.provenance
    with pytest.raises(ValueError, match=r"other settings \(calibration.rounding_sequences"):
        run_profile(
            settings(tiny_folder, "curved", include=("model.layers.0.*",), rounding_sequences=4),
            tmp_path / "run",
            QUIET,
        )


def test_own_batches_are_asked_for_again() -> None:
    net = toy_of(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 9))).module
    batches = [torch.randn(16, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    plan = solve(profile(net, batches, FORMATS, rounding="curved"), "3.5bpw")
    from bitplan.jobs.materialize import apply

    before = net(batches[0])
    apply(net, plan, batches)
    assert not torch.equal(net(batches[0]), before)

"""A search with --tune: what was measured is what is kept, packed, loaded and exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitplan._base.progress import Reporter
from bitplan.exporters.export import Exported, export
from bitplan.exporters.source import open_source
from bitplan.exporters.targets import find
from bitplan.jobs import tuning
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.held_out import run_eval
from bitplan.jobs.materialize import apply, load, quantize
from bitplan.jobs.record import JobRecord
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.models.load import load_model
from bitplan.quantizers.checkpoint import read_checkpoint
from bitplan.quantizers.packed import PackedTensor
from bitplan.reports.summary import facts
from bitplan.search.plan import Plan, plan_key
from bitplan.sensitivity.tuning import Tuner

FORMATS = ("int2-g64-asym", "int3-g64-asym", "int4-g64-asym", "bf16")
STEPS = 10


class Said(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def settings(model: Path | str, rounding: str = "rtn", **changed: object) -> ProfileSettings:
    shared = {"sequences": 32, "length": 32, "device": "cpu", "rounding": rounding}
    options = {"formats": FORMATS, "include": ("model.layers.*",)} | shared | changed
    return ProfileSettings(str(model), **options)  # type: ignore[arg-type]


def asked(**changed: object) -> SearchSettings:
    shared = {"refine": 0, "eval_tokens": 1024, "bootstrap": 0, "guard": 32, "tune": STEPS}
    goal = {} if {"max_kl", "vram"} & changed.keys() else {"budget": "2.6bpw"}
    return SearchSettings(**shared | goal | changed)  # type: ignore[arg-type]


def untuned(plan: Plan) -> float:
    """KL of the same plan before tuning, on the same tokens."""
    return next(b.kl for b in plan.baselines if b.name == "certified plan")


@pytest.fixture(scope="module", params=["rtn", "gptq"])
def searched(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Plan]:
    run = tmp_path_factory.mktemp("tuned") / request.param
    return run, run_search(settings(tiny_folder, request.param), asked(), run, Said())


def parts(target: Path) -> dict[str, PackedTensor]:
    return dict(open_source(target).each())


def test_a_tuned_plan_ships_where_it_measures_better(searched: tuple[Path, Plan]) -> None:
    run, plan = searched
    assert plan.tuning is not None and plan.measured is not None
    assert plan.tuning.kl_after < plan.tuning.kl_before
    assert plan.measured.kl < untuned(plan)
    same = plan.model_copy(update={"tuning": None})
    assert plan_key(plan) != plan_key(same)
    assert Plan.load(run / "plan.json") == plan
    assert RunFolder(run).tuned_scales(plan.tuning.sha256).is_file()
    assert "tune" in [stage.name for stage in JobRecord.load(run).stages]
    words = dict(facts(plan, []))["tuned"]
    assert words.startswith("scales: KL on calibration sequences ")
    assert words.endswith((f" in {plan.tuning.steps} steps", " in 1 step"))


def test_only_scales_differ_from_the_untuned_plan(
    searched: tuple[Path, Plan], tmp_path: Path
) -> None:
    run, plan = searched
    tuned = parts(run)
    shutil.copytree(run, tmp_path / "run")
    plain = plan.model_copy(update={"tuning": None, "codes_sha256": None})
    plain.save(tmp_path / "run" / "plan.json")
    differ = 0
    for name, before in parts(tmp_path / "run").items():
        assert before.nbytes == tuned[name].nbytes
        for part, tensor in before.tensors.items():
            same = torch.equal(tensor, tuned[name].tensors[part])
            assert same or part == "scale"
            differ += not same
    assert differ == sum(fmt != "bf16" for fmt in plan.assignments.values())


def test_what_is_packed_loads_and_measures_the_same(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path
) -> None:
    run, plan = searched
    assert plan.measured is not None
    _, found, _ = run_eval(run, "builtin", None, "cpu", Said())
    assert found.mean_kl == pytest.approx(plan.measured.kl, rel=1e-4)
    folder = quantize(run / "plan.json", tmp_path / "packed")
    _, packed, _ = run_eval(folder, "builtin", None, "cpu", Said())
    assert packed.mean_kl == pytest.approx(plan.measured.kl, rel=1e-3)
    assert packed.mean_kl < untuned(plan)
    stored, _, _ = read_checkpoint(folder)
    for name, weight in parts(run).items():
        assert all(torch.equal(stored[name].tensors[p], t) for p, t in weight.tensors.items())
    ids = torch.arange(16)[None]
    ours = load(folder)(input_ids=ids).logits
    if plan.rounding == "rtn":  # takes the folder of the plan, and no batches
        applied = apply(load_model(str(tiny_folder), "cpu").module, run / "plan.json")
        torch.testing.assert_close(applied(input_ids=ids).logits, ours)


def written(done: Exported) -> dict[str, Tensor]:
    """The weights in the files of an export, as their own reader sees them."""
    stored = find(done.target)[1].read(done.path, done.source.model)
    return {each.name: each.weight() for each in stored if not each.fmt.floating}


@pytest.mark.parametrize("target", ["gptq", "autoround", "mlx"])
def test_exports_hold_tuned_scales(
    searched: tuple[Path, Plan], target: str, tmp_path: Path
) -> None:
    run, _ = searched
    done = export(run, target, tmp_path / target, round_up=True)
    tuned, found, compared = parts(run), written(done), 0
    for name in found.keys() & tuned.keys() - done.changed.keys():
        error = (found[name] - tuned[name].dequantize()).abs().max()
        assert float(error) < 1e-6, name
        compared += 1
    assert compared >= 4


def test_blocks_of_llama_cpp_are_tuned_and_exported(
    wide_folder: Path, wide_gguf: Path, tmp_path: Path
) -> None:
    formats = ("q2_k", "q3_k", "q4_1", "iq4_xs")
    profile = settings(wide_folder, formats=formats, include=("model.layers.0.*",), sequences=16)
    plan = run_search(
        profile, asked(budget="3.4bpw", tune=8, runtime="llama.cpp"), tmp_path / "run", Said()
    )
    assert plan.tuning is not None and len(set(plan.assignments.values())) > 1
    done = export(tmp_path / "run", "gguf", tmp_path / "m.gguf", like=wide_gguf)
    found = written(done)
    for name, weight in parts(tmp_path / "run").items():
        torch.testing.assert_close(found[name], weight.dequantize(), rtol=0, atol=1e-7)


def test_the_same_command_finds_the_tuned_plan(
    searched: tuple[Path, Plan], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = searched
    monkeypatch.setattr(Tuner, "__init__", None)  # nothing is tuned again
    again = run_search(settings(tiny_folder, plan.rounding), asked(), run, Said())
    assert again.model_copy(update={"created": plan.created}) == plan


def test_a_plan_without_its_folder_says_what_to_copy(
    searched: tuple[Path, Plan], tmp_path: Path
) -> None:
    run, plan = searched
    assert plan.tuning is not None
    with pytest.raises(ValueError, match=r"scales were tuned, .* give the path of its plan.json"):
        quantize(plan, tmp_path / "packed")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(run / "plan.json", moved / "plan.json")
    name = f"tuned/{plan.tuning.sha256[:16]}.safetensors"
    with pytest.raises(ValueError, match=f"is not there. .* copy {name} from there"):
        quantize(moved / "plan.json", tmp_path / "packed")
    (moved / "tuned").mkdir()
    shutil.copy(run / name, moved / name)
    for packed, weight in zip(
        read_checkpoint(quantize(moved / "plan.json", tmp_path / "packed"))[0].values(),
        parts(run).values(),
        strict=True,
    ):
        assert torch.equal(packed.dequantize(), weight.dequantize())
    content = bytearray((moved / name).read_bytes())
    content[-1] ^= 1
    (moved / name).write_bytes(content)
    with pytest.raises(ValueError, match="does not hold the scales that the plan was measured"):
        quantize(moved / "plan.json", tmp_path / "packed")


def test_a_killed_run_comes_to_the_same_plan(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = searched
    step, taken, most = Tuner.step, list[int](), STEPS - 1  # after the check of step 8

    def dying(tuner: Tuner) -> None:
        if len(taken) == most:
            raise KeyboardInterrupt
        taken.append(tuner.taken)
        step(tuner)

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "tuned")
    profile = settings(tiny_folder, plan.rounding)
    monkeypatch.setattr(Tuner, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_search(profile, asked(), copy, Said())
    taken.clear()
    again = run_search(profile, asked(), copy, Said())
    assert taken == list(range(8, STEPS))
    assert again.tuning == plan.tuning
    assert again.codes_sha256 == plan.codes_sha256


def test_a_tuning_that_does_not_help_ships_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "standard_error", lambda _: 1e3)
    said = Said()
    plan = run_search(settings(tiny_folder), asked(tune=1), tmp_path / "run", said)
    assert plan.tuning is None
    assert "tuned plan" not in [b.name for b in plan.baselines]
    assert any(line.startswith("Not tuned: the best scales, of step 1") for line in said.lines)
    again = run_search(settings(tiny_folder), asked(tune=1), tmp_path / "run", Said())
    assert again.tuning is None


def test_floats_have_nothing_to_tune(tiny_folder: Path, tmp_path: Path) -> None:
    said = Said()
    profile = settings(tiny_folder, formats=("bf16",))
    plan = run_search(profile, asked(budget="16bpw"), tmp_path / "run", said)
    assert plan.tuning is None
    assert "Not tuned: bf16 have no scales in float16." in said.lines


def test_without_text_apart_the_search_is_refused_at_once(
    tiny_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The model stores a scale for every row of every weight. " * 35)
    profile = settings(tiny_folder, calibration=str(text), sequences=16)
    with pytest.raises(ValueError, match=r"holds \d+ sequences of 32 tokens, 48 are needed"):
        run_search(profile, asked(), tmp_path / "run", Said())
    assert not RunFolder(tmp_path / "run").profile.exists()


def test_the_smallest_plan_of_a_quality_is_tuned_too(tiny_folder: Path, tmp_path: Path) -> None:
    plan = run_search(settings(tiny_folder), asked(max_kl=0.3), tmp_path / "run", Said())
    assert plan.tuning is not None and plan.measured is not None
    assert plan.measured.kl < untuned(plan) <= 0.3
    other = next(b for b in plan.baselines if b.name == "certified plan")
    assert plan.total_bytes == other.bytes


def toy() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 9))
    return net.requires_grad_(False).eval()


NETWORK = """
import torch
from bitplan import Workload
from bitplan.tests.unit.test_tuning_runs import toy

def workload():
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn({size}, 64, generator=generator) for _ in range(8)]
    return Workload(toy(), batches)
"""


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK.format(size=16))
    profile = settings(f"{tmp_path / 'net.py'}:workload", include=(), sequences=96, length=128)
    plan = run_search(profile, asked(budget="3bpw", tune=16), tmp_path / "run", Said())
    assert plan.tuning is not None
    net = toy()
    before: Tensor = net(torch.ones(1, 64)).clone()
    assert not torch.equal(apply(net, tmp_path / "run" / "plan.json")(torch.ones(1, 64)), before)
    (tmp_path / "net.py").write_text(NETWORK.format(size=2))
    with pytest.raises(ValueError, match=r"too few to search on measured KL.*no --tune"):
        run_search(profile, asked(budget="3bpw"), tmp_path / "other", Said())

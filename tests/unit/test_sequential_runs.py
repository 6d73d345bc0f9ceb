"""A search with --sequential: what was measured is what is kept, packed, loaded and exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitplan._base.progress import Reporter
from bitplan.exporters.export import Exported, export
from bitplan.exporters.source import open_source
from bitplan.exporters.targets import find
from bitplan.jobs import rerounding
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.held_out import run_eval
from bitplan.jobs.materialize import quantize
from bitplan.jobs.record import JobRecord
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.quantizers.checkpoint import read_checkpoint
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.store import Renderings
from bitplan.reports.summary import facts
from bitplan.search.plan import Plan, plan_key
from bitplan.sensitivity.sequential import Sequential

FORMATS = ("int2-g64-asym", "int3-g64-asym", "bf16")


class Said(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def settings(model: Path | str, rounding: str = "fisher_gptq") -> ProfileSettings:
    return ProfileSettings(
        str(model),
        formats=FORMATS,
        include=("model.layers.*",),
        sequences=16,
        rounding_sequences=64,
        length=32,
        device="cpu",
        rounding=rounding,
    )


def asked(**changed: object) -> SearchSettings:
    shared = {"refine": 0, "eval_tokens": 1024, "bootstrap": 0, "guard": 32, "eval_also": "none"}
    options = {"budget": "2.5bpw", "sequential": True} | shared | changed
    return SearchSettings(**options)  # type: ignore[arg-type]


def accept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever was rounded again pass for better than it was."""
    monkeypatch.setattr(rerounding, "standard_error", lambda _: -1e3)


def parts(target: Path) -> dict[str, PackedTensor]:
    return dict(open_source(target).each())


def first_rounding(run: Path, plan: Plan, other: Path) -> dict[str, PackedTensor]:
    """The weights of the plan as they were before."""
    shutil.copytree(run, other)
    plain = plan.model_copy(update={"sequential": None, "tuning": None, "codes_sha256": None})
    plain.save(other / "plan.json")
    return parts(other)


@pytest.fixture(scope="module")
def searched(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    run = tmp_path_factory.mktemp("sequential") / "run"
    with pytest.MonkeyPatch.context() as patch:
        accept(patch)
        return run, run_search(settings(tiny_folder), asked(), run, Said())


def test_a_plan_that_was_rounded_again_says_so(searched: tuple[Path, Plan]) -> None:
    run, plan = searched
    assert plan.sequential is not None and plan.measured is not None
    assert plan.sequential.matrices == len(
        [fmt for fmt in plan.assignments.values() if fmt != "bf16"]
    )
    before = next(b for b in plan.baselines if b.name == "certified plan")
    assert before.bytes == plan.total_bytes and before.kl > plan.measured.kl
    assert plan_key(plan) != plan_key(plan.model_copy(update={"sequential": None}))
    assert Plan.load(run / "plan.json") == plan
    names = [stage.name for stage in JobRecord.load(run).stages]
    assert names.index("solve") < names.index("sequential") < names.index("validate")
    words = dict(facts(plan, []))["rounded again"]
    assert words.startswith(f"{plan.sequential.matrices} matrices, block by block: KL")


def test_only_codes_and_scales_differ(searched: tuple[Path, Plan], tmp_path: Path) -> None:
    run, plan = searched
    now, differ = parts(run), set()
    for name, before in first_rounding(run, plan, tmp_path / "run").items():
        assert (before.fmt, before.shape, before.nbytes) == (
            now[name].fmt,
            now[name].shape,
            now[name].nbytes,
        )
        if not torch.equal(before.dequantize(), now[name].dequantize()):
            differ.add(name)
    later = {n for n, f in plan.assignments.items() if ".layers.1." in n and f != "bf16"}
    assert len(later) > 4 and later <= differ


def test_what_is_packed_is_what_was_measured(searched: tuple[Path, Plan], tmp_path: Path) -> None:
    run, plan = searched
    assert plan.measured is not None
    _, found, _ = run_eval(run, "builtin", None, "cpu", Said())
    assert found.mean_kl == pytest.approx(plan.measured.kl, rel=1e-4)
    folder = quantize(run / "plan.json", tmp_path / "packed")
    _, packed, _ = run_eval(folder, "builtin", None, "cpu", Said())
    assert packed.mean_kl == pytest.approx(plan.measured.kl, rel=1e-3)
    stored, _, _ = read_checkpoint(folder)
    for name, weight in parts(run).items():
        assert all(torch.equal(stored[name].tensors[p], t) for p, t in weight.tensors.items())


def written(done: Exported) -> dict[str, Tensor]:
    """The weights in the files of an export, as their own reader sees them."""
    stored = find(done.target)[1].read(done.path, done.source.model)
    return {each.name: each.weight() for each in stored if not each.fmt.floating}


def test_exports_hold_the_new_weights(searched: tuple[Path, Plan], tmp_path: Path) -> None:
    run, _ = searched
    done = export(run, "gptq", tmp_path / "gptq", round_up=True)
    now, found, compared = parts(run), written(done), 0
    for name in found.keys() & now.keys() - done.changed.keys():
        assert float((found[name] - now[name].dequantize()).abs().max()) < 1e-6, name
        compared += 1
    assert compared >= 4


def test_the_same_command_finds_what_was_rounded(
    searched: tuple[Path, Plan], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = searched
    accept(monkeypatch)
    monkeypatch.setattr(Sequential, "__init__", None)  # nothing is rounded again
    again = run_search(settings(tiny_folder), asked(), run, Said())
    assert again.model_copy(update={"created": plan.created}) == plan


def test_scales_are_tuned_on_top(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = searched
    accept(monkeypatch)
    shutil.copytree(run, tmp_path / "run")
    tuned = run_search(settings(tiny_folder), asked(tune=8), tmp_path / "run", Said())
    assert tuned.tuning is not None and tuned.sequential == plan.sequential
    for name, before in parts(run).items():
        for part, tensor in parts(tmp_path / "run")[name].tensors.items():
            assert part == "scale" or torch.equal(tensor, before.tensors[part])
    _, found, _ = run_eval(tmp_path / "run", "builtin", None, "cpu", Said())
    assert tuned.measured is not None
    assert found.mean_kl == pytest.approx(tuned.measured.kl, rel=1e-4)


def test_a_plan_without_its_folder_says_what_to_copy(
    searched: tuple[Path, Plan], tmp_path: Path
) -> None:
    run, plan = searched
    assert plan.sequential is not None
    with pytest.raises(ValueError, match=r"rounded again, .* give the path of its plan.json"):
        quantize(plan, tmp_path / "packed")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(run / "plan.json", moved / "plan.json")
    with pytest.raises(ValueError, match=r"lists them, is not there. .* copy the folder rounded/"):
        quantize(moved / "plan.json", tmp_path / "packed")
    shutil.copytree(run / "rounded", moved / "rounded")
    shutil.copytree(run / "renderings", moved / "renderings")
    for packed, weight in zip(
        read_checkpoint(quantize(moved / "plan.json", tmp_path / "packed"))[0].values(),
        parts(run).values(),
        strict=True,
    ):
        assert torch.equal(packed.dequantize(), weight.dequantize())
    path = next(moved.glob("rounded/*/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not in .*rounded, or is damaged"):
        quantize(moved / "plan.json", tmp_path / "packed")
    listed = RunFolder(moved).rounded_list(plan.sequential.sha256)
    listed.write_text("{}")
    with pytest.raises(ValueError, match="does not list the weights that the plan was measured"):
        quantize(moved / "plan.json", tmp_path / "packed")


def test_a_killed_run_comes_to_the_same_weights(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = searched
    accept(monkeypatch)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "rounded")
    rounded: list[str] = []
    real = Renderings.round

    def dying(store: Renderings, name: str, *others: object) -> PackedTensor:
        if len(rounded) >= 7 and "layers.1" in name:
            raise KeyboardInterrupt
        rounded.append(name)
        return real(store, name, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Renderings, "round", dying)
    with pytest.raises(KeyboardInterrupt):
        run_search(settings(tiny_folder), asked(), copy, Said())
    assert {".".join(name.split(".")[:3]) for name in rounded} == {"model.layers.0"}
    first = set(rounded)
    monkeypatch.setattr(Renderings, "round", real)
    spied: list[str] = []

    def spy(store: Renderings, name: str, *others: object) -> PackedTensor:
        spied.append(name)
        return real(store, name, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Renderings, "round", spy)
    again = run_search(settings(tiny_folder), asked(), copy, Said())
    assert spied and not first & set(spied)
    assert again.sequential == plan.sequential
    assert again.codes_sha256 == plan.codes_sha256


def test_weights_that_are_gone_are_made_again(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = searched
    accept(monkeypatch)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    files = sorted(copy.glob("rounded/*/*.safetensors"))
    files[0].unlink()
    files[-1].write_bytes(b"damaged")
    again = run_search(settings(tiny_folder), asked(), copy, Said())
    assert again.sequential == plan.sequential
    assert sorted(copy.glob("rounded/*/*.safetensors")) == files
    quantize(copy / "plan.json", tmp_path / "packed")


def test_what_does_not_help_ships_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerounding, "standard_error", lambda _: 1e3)
    said = Said()
    plan = run_search(settings(tiny_folder, "gptq"), asked(), tmp_path / "run", said)
    assert plan.sequential is None
    assert "sequential plan" not in [b.name for b in plan.baselines]
    assert any(line.startswith("Not rounded again: block by block the KL") for line in said.lines)
    again = run_search(settings(tiny_folder, "gptq"), asked(), tmp_path / "run", Said())
    assert again.sequential is None


def test_methods_that_look_at_no_inputs_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'rtn' looks at no inputs. Leave it out, or round by"):
        run_search(settings(tiny_folder, "rtn"), asked(), tmp_path / "run", Said())
    assert not (tmp_path / "run").exists()

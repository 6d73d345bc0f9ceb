"""A search with --fold: what was measured is what is kept, packed, loaded and exported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitplan._base.progress import Reporter
from bitplan.exporters.export import export
from bitplan.exporters.source import open_source
from bitplan.exporters.verify import verify
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.held_out import run_eval
from bitplan.jobs.materialize import apply, load, quantize
from bitplan.jobs.search import run_profile, run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.models.identity import state_sha256
from bitplan.models.load import load_model
from bitplan.search.plan import Plan
from bitplan.sensitivity.table import SensitivityTable

FORMATS = ("int3-g64-asym", "int4-g64-asym", "int8-g64-asym", "bf16")
BLOCKS = ("q4_k", "q6_k", "q8_0")
IDS = torch.arange(4, 20)[None]


class Said(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def settings(model: Path | str, fold: str, **changed: object) -> ProfileSettings:
    shared = {"sequences": 32, "length": 32, "device": "cpu", "rounding": "rtn", "fold": fold}
    options = {"formats": FORMATS, "include": ("model.layers.*",)} | shared | changed
    return ProfileSettings(str(model), **options)  # type: ignore[arg-type]


def search(model: Path, run: Path, fold: str, said: Said, **changed: object) -> Plan:
    asked = SearchSettings(
        budget="4.2bpw", refine=0, eval_tokens=1024, bootstrap=0, guard=32, eval_also="none"
    )
    if "formats" in changed:
        asked = SearchSettings(
            budget="5.5bpw", refine=0, eval_tokens=512, bootstrap=0, guard=32, eval_also="none"
        )
    return run_search(settings(model, fold, **changed), asked, run, said)


@pytest.fixture(scope="module", params=["awq-rtn", "sinq-gptq"])
def searched(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Plan, list[str]]:
    fold, rounding = request.param.split("-")
    run, said = tmp_path_factory.mktemp("folded") / "run", Said()
    return run, search(tiny_folder, run, fold, said, rounding=rounding), said.lines


Searched = tuple[Path, Plan, list[str]]


def test_the_plan_says_what_was_folded(searched: Searched, tiny_folder: Path) -> None:
    run, plan, said = searched
    assert plan.fold is not None
    assert plan.fold.count == 8  # two norms, values and up, in two layers
    assert plan.fold.model_sha256 == state_sha256(load_model(str(tiny_folder), "cpu").module)
    assert plan.model.sha256 != plan.fold.model_sha256
    assert RunFolder(run).fold(plan.fold.sha256).is_file()
    assert Plan.load(run / "plan.json") == plan
    assert SensitivityTable.load(RunFolder(run).profile).provenance.fold == plan.fold
    assert [line for line in said if "folded into 8 norms and linear layers" in line]


def test_what_is_packed_loads_and_measures_the_same(
    searched: Searched, tiny_folder: Path, tmp_path: Path
) -> None:
    run, plan, _ = searched
    assert plan.measured is not None and plan.fold is not None
    _, found, _ = run_eval(run, "builtin", None, "cpu", Said())
    assert found.mean_kl == pytest.approx(plan.measured.kl, rel=1e-4)
    folder = quantize(run / "plan.json", tmp_path / "packed")
    _, packed, _ = run_eval(folder, "builtin", None, "cpu", Said())  # against the unfolded model
    assert packed.mean_kl == pytest.approx(plan.measured.kl, rel=1e-3)
    ours = load(folder)(input_ids=IDS).logits
    original = load_model(str(tiny_folder), "cpu").module
    applied = apply(original, run / "plan.json")
    torch.testing.assert_close(applied(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-4)


def test_another_process_finds_the_same_scales_again(
    searched: Searched, tiny_folder: Path, tmp_path: Path
) -> None:
    _, plan, _ = searched
    assert plan.fold is not None
    again, before = tmp_path / "again", plan.fold.method
    table = run_profile(settings(tiny_folder, before, rounding=plan.rounding), again, Said())
    assert table.provenance.fold == plan.fold  # chosen anew: the same
    assert table.provenance.model == plan.model
    said = Said()
    RunFolder(again).profile.unlink()
    run_profile(settings(tiny_folder, before, rounding=plan.rounding), again, said)
    assert len(list(RunFolder(again).folds.iterdir())) == 1
    with pytest.raises(ValueError, match=r"other settings \(model.sha256"):
        run_profile(settings(tiny_folder, "none", rounding=plan.rounding), again, Said())


def test_scales_that_are_gone_or_damaged_are_named(searched: Searched, tmp_path: Path) -> None:
    run, plan, _ = searched
    assert plan.fold is not None
    other = tmp_path / "run"
    shutil.copytree(run, other)
    path = RunFolder(other).fold(plan.fold.sha256)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"does not hold the scales that were folded"):
        quantize(other / "plan.json", tmp_path / "packed")
    path.unlink()
    with pytest.raises(ValueError, match=r"is not there\. Use the plan in the folder of its run"):
        run_eval(other, "builtin", 64, "cpu", Said())
    with pytest.raises(ValueError, match=r"give the path of its plan\.json"):
        open_source(plan)


def test_exports_compute_what_was_measured(searched: Searched, tmp_path: Path) -> None:
    run, _, _ = searched
    done = export(run, "compressed_tensors", tmp_path / "out", round_up=True)
    assert verify(done, tokens=128).agrees
    module: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs: Tensor = module(input_ids=IDS).logits
    ours = done.source.logits(IDS)
    torch.testing.assert_close(theirs.float(), ours, rtol=1e-3, atol=1e-3)


def test_a_gguf_file_holds_the_folded_norms(
    wide_folder: Path, wide_gguf: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    plan = search(wide_folder, run, "awq", Said(), formats=BLOCKS)
    packed = quantize(run / "plan.json", tmp_path / "packed")
    original = load_model(str(wide_folder), "cpu").logits(IDS)
    for number, target in enumerate((run, packed)):
        out = tmp_path / f"m{number}.gguf"
        source = export(target, "gguf", out, like=wide_gguf).source
        ours, theirs = source.logits(IDS), load_model(str(out), "cpu").logits(IDS)
        assert (theirs - ours).abs().max() < 1e-3 * ours.abs().max()
        assert (ours - original).abs().max() < 0.5 * original.abs().max()
    assert plan.fold is not None
    RunFolder(packed).fold(plan.fold.sha256).unlink()
    with pytest.raises(ValueError, match="is not there"):
        export(packed, "gguf", tmp_path / "n.gguf", like=wide_gguf)


def test_an_unknown_fold_is_found_out_early(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown fold 'awk'\. Did you mean 'awq'\? Available: "):
        run_profile(settings(tiny_folder, "awk"), tmp_path / "run", Said())


def test_weights_that_stay_in_files_are_not_folded(tiny_folder: Path, tmp_path: Path) -> None:
    there = settings(tiny_folder, "awq", memory="1MB")
    with pytest.raises(ValueError, match=r"stay in its files.*--memory, or search without --fold"):
        run_profile(there, tmp_path / "run", Said())

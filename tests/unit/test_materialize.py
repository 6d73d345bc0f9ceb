"""Packed folders of unusual checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitplan
from bitplan.search.materialize import load_packed, planned_units
from bitplan.search.plan import Plan
from bitplan.sensitivity.calibration import calibration_samples
from bitplan.sensitivity.models import load_model

FORMATS = ("int3-g32-asym", "int5-g64", "keep")


@pytest.fixture(scope="module")
def bfloat16_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bfloat16, with a norm only float32 can hold and two ends of text."""
    folder = tmp_path_factory.mktemp("bf16") / "model"
    shutil.copytree(tiny_folder, folder)
    tensors = {
        name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 2**-20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    generation = {"eos_token_id": [0, 7], "pad_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def plan(bfloat16_folder: Path) -> Plan:
    model = load_model(str(bfloat16_folder), "cpu")
    samples = calibration_samples(model, sequences=12, length=32)
    table = bitplan.profile(model, samples, FORMATS, exclude=["lm_head"])
    assert table.formats == ("int3-g32-asym", "int5-g64", "bf16")
    return bitplan.solve(table, "9bpw", pins={"*.down_proj": "keep"})


def test_a_bfloat16_checkpoint_keeps_its_precision_and_settings(
    bfloat16_folder: Path, plan: Plan, tmp_path: Path
) -> None:
    assert plan.assignments["model.layers.0.mlp.down_proj"] == "bf16"
    folder = bitplan.quantize(plan, tmp_path / "packed")
    stored = load_file(folder / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.norm.weight"].dtype == torch.float32

    packed = load_packed(folder)
    ids = torch.arange(24).view(2, 12)
    original = load_model(str(bfloat16_folder), "cpu")
    bitplan.apply(original.module, plan)
    torch.testing.assert_close(packed.logits(ids), original.logits(ids))
    assert packed.module.generation_config.eos_token_id == [0, 7]  # type: ignore[union-attr]
    assert packed.is_language_model


def test_other_weights_are_refused(bfloat16_folder: Path, plan: Plan) -> None:
    module = load_model(str(bfloat16_folder), "cpu").module
    assert len(planned_units(module, plan)) == len(plan.assignments)
    module.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] += 1
    with pytest.raises(ValueError, match="made for other weights"):
        planned_units(module, plan)


def test_other_folders_are_not_replaced(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ValueError, match="is not a packed model"):
        bitplan.quantize(plan, tmp_path)
    assert (tmp_path / "precious").is_file()


def test_a_plan_changed_by_hand_is_refused(plan: Plan, tmp_path: Path) -> None:
    edited = plan.model_copy(update={"bytes": plan.bytes - 1})
    with pytest.raises(ValueError, match="was changed after it was made"):
        bitplan.quantize(edited, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_packed_folder_with_the_plan_of_another(plan: Plan, tmp_path: Path) -> None:
    folder = bitplan.quantize(plan, tmp_path / "packed")
    name = "model.layers.0.mlp.up_proj"
    plan.model_copy(update={"assignments": plan.assignments | {name: "fp16"}}).save(
        folder / "plan.json"
    )
    with pytest.raises(ValueError, match="is not the plan"):
        bitplan.load(folder)

"""Packed folders of unusual checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import bitplan
from bitplan.jobs.materialize import load_packed, planned_units
from bitplan.kernels import native
from bitplan.models.load import load_model
from bitplan.models.samples import calibration_samples
from bitplan.quantizers.checkpoint import read_checkpoint, write_checkpoint
from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import PackedTensor
from bitplan.search.plan import Plan

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


def test_activations_in_16_bits(plan: Plan, tmp_path: Path) -> None:
    folder = bitplan.quantize(plan, tmp_path / "packed")
    exact, half = bitplan.load(folder), bitplan.load(folder, dtype=torch.bfloat16)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        wanted, found = exact(ids).logits, half(ids).logits
    assert found.dtype == torch.bfloat16
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    frequencies = half.get_buffer("model.rotary_emb.inv_freq")
    assert torch.equal(frequencies, exact.get_buffer("model.rotary_emb.inv_freq"))
    for name, part in exact.state_dict().items():
        if name.endswith(("codes", "scale", "zero")):
            assert torch.equal(half.state_dict()[name], part)


def test_loading_keeps_what_is_stored_in_16_bits(plan: Plan, tmp_path: Path) -> None:
    folder = bitplan.quantize(plan, tmp_path / "packed")
    model = bitplan.load(folder)
    state = model.state_dict()
    embedding = state["model.embed_tokens.weight"]
    assert embedding.dtype == torch.bfloat16
    assert state["lm_head.weight"].data_ptr() == embedding.data_ptr()  # tied
    stored = load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    with torch.no_grad():
        assert model(torch.arange(6)[None]).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.norm.weight", torch.ones(3), r"model.safetensors does not fit.*model.norm.weight"),
        ("model.layers.0.mlp.up_proj.scale", None, r"damaged: '\S+up_proj.scale' has values"),
    ],
)
def test_damage_is_named(
    name: str, value: torch.Tensor | None, message: str, plan: Plan, tmp_path: Path
) -> None:
    folder = bitplan.quantize(plan, tmp_path / "packed")
    packed, others, header = read_checkpoint(folder)
    if value is None:
        module, part = name.rsplit(".", 1)
        packed[module].tensors[part][0, 0] = torch.inf
    else:
        others[name] = value
    shutil.rmtree(folder)
    folder = bitplan.quantize(plan, tmp_path / "packed")
    write_checkpoint(folder, packed, others, header)
    with pytest.raises(ValueError, match=message):
        bitplan.load(folder)


MEMORY = """
import sys
import accelerate, bitplan, transformers
from transformers.models.llama import modeling_llama
from bitplan.jobs import materialize
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
before = peak()
model = bitplan.load(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(native.unavailable() is not None, reason="needs the compiled CPU kernels")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peaks from /proc")
def test_loading_takes_little_more_memory_than_the_file(plan: Plan, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=16,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    fmt = Format.parse("int8-g64")
    packed, others = {}, {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            shape = (tensor.shape[0], tensor.shape[1])
            parts = {
                part: torch.ones(size, dtype=getattr(torch, dtype))
                for part, (size, dtype) in fmt.tensors(shape).items()
            }
            packed[name.removesuffix(".weight")] = PackedTensor(fmt, shape, parts)
        else:
            others[name] = torch.ones(tensor.shape)
    write_checkpoint(tmp_path, packed, others, {"aliases": {}, "tied": {}})
    config.save_pretrained(tmp_path)
    plan.model_copy(update={"assignments": dict.fromkeys(packed, fmt.name)}).save(
        tmp_path / "plan.json"
    )
    file = (tmp_path / "model.safetensors").stat().st_size

    def times_the_file(**environment: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        return int(done.stdout) / file

    assert times_the_file() < 1.3
    assert times_the_file(CXX="no-such-compiler") > 3  # dequantized copies would be seen

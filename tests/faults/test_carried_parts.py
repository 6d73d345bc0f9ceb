"""Tensors that the architecture does not know, in checkpoints of 8- and 4-bit floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitplan._base.tensors import bytes_of
from bitplan.exporters.configs.own_names import check_inventory
from bitplan.exporters.export import export
from bitplan.exporters.source import open_source
from bitplan.jobs.materialize import load_packed, quantize
from bitplan.models.fp8 import decode_fp8
from bitplan.models.load import load_model
from bitplan.models.origin import origin_of, tensor_files
from bitplan.models.side_files import side_files
from bitplan.testing.plans import hand_made
from bitplan.tests.faults import tiny
from bitplan.tests.faults.test_checkpoints import add_layer_after_the_last, attention

BLOCK = (48, 40)


def test_8_bit_floats_that_are_carried_along_keep_their_scales(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "Qwen3")

    def edit(state: dict[str, Tensor]) -> None:
        add_layer_after_the_last(state)
        tiny.to_fp8(BLOCK)(state)
        state["model.layers.2.mlp.up_proj.input_scale"] = torch.ones(())

    tiny.change(folder, edit)
    tiny.configure(folder, quantization_config=tiny.fp8_config(BLOCK))
    before = tiny.tensors(folder)
    model = load_model(str(folder), "cpu")
    assert model.origin is not None
    unknown = {name for name in before if ".layers.2." in name}
    assert {one.name for one in model.origin.carried} == unknown
    plan = hand_made(model, attention(model))
    quantize(plan, tmp_path / "packed", model)
    after = tiny.tensors(tmp_path / "packed")
    assert all(bytes_of(after[name]) == bytes_of(before[name]) for name in unknown)
    export(plan, "vllm", tmp_path / "exported", model=model)
    export(tmp_path / "packed", "compressed-tensors", tmp_path / "again")
    for written in ("exported", "again"):
        after = tiny.tensors(tmp_path / written)
        for name in [n for n in unknown if n.endswith("_proj.weight")]:
            expected = decode_fp8(before[name], before[f"{name}_scale_inv"], BLOCK)
            assert torch.equal(after[name], expected), (written, name)
        assert not [n for n in after if n.endswith("_scale_inv")]


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_pytorch_s_own_carry_along_too(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tmp_path / "model")
    state = tiny.tensors(folder)
    add_layer_after_the_last(state)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    model = load_model(str(folder), "cpu")
    assert model.origin is not None
    carried = dict(model.origin.others())
    assert carried.keys() == {name for name in state if ".layers.2." in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in carried.items())
    assert all(one.nbytes == state[one.name].nbytes for one in model.origin.carried)
    loads: list[Path] = []
    real = torch.load

    def load(file: Path, **options: Any) -> Any:
        loads.append(file)
        return real(file, **options)

    monkeypatch.setattr(torch, "load", load)
    origin_of(folder, model.module)
    assert len(loads) == 2  # for its names, and for all sizes


def test_what_lies_elsewhere_is_not_carried_along(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    folder = cache / "snapshots" / "1"
    for file, text in (("blobs/f0", "licence"), ("secret", "key"), ("snapshots/1/own", "own")):
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        (cache / file).write_text(text)
    (folder / "LICENSE").symlink_to("../../blobs/f0")
    (folder / "notes.txt").symlink_to(cache / "secret")
    (folder / "again").symlink_to("own")
    assert [str(path) for path in side_files(folder)] == ["LICENSE", "again", "own"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../other/model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the file '\.\./other/model-2\.safetensors'"):
        tensor_files(folder)


def test_the_bias_of_a_planned_matrix_is_part_of_the_inventory(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "Qwen2")
    model = load_model(str(folder), "cpu")
    plan = hand_made(model, attention(model))
    export(plan, "vllm", tmp_path / "out", model=model)
    written = dict.fromkeys(tiny.names(tmp_path / "out"), 0)
    source = open_source(plan, model=model)
    check_inventory(source, written)
    del written["model.layers.0.self_attn.q_proj.bias"]
    with pytest.raises(ValueError, match=r"q_proj\.bias' of .* is not among"):
        check_inventory(source, written)


def test_4_bit_floats_that_were_decoded_are_not_carried_along(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "GptOss", num_local_experts=4, head_dim=16)

    def edit(state: dict[str, Tensor]) -> None:
        for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, cols, rows = state.pop(name).shape
            shape = (experts, rows, cols // 32)
            state[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            state[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)

    tiny.change(folder, edit)
    tiny.configure(folder, quantization_config={"quant_method": "mxfp4"})
    model = load_model(str(folder), "cpu")
    assert model.origin is not None and not model.origin.carried
    quantize(hand_made(model, attention(model)), tmp_path / "packed", model)
    assert not [n for n in tiny.names(tmp_path / "packed") if n.endswith(("_blocks", "_scales"))]
    assert load_packed(tmp_path / "packed").module is not None
    plan = hand_made(model, attention(model))
    export(plan, "compressed-tensors", tmp_path / "exported", model=model)
    assert not [n for n in tiny.names(tmp_path / "exported") if n.endswith("_blocks")]

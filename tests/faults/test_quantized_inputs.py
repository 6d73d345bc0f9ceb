"""Models that are quantized already: decoded exactly, or refused by name before anything slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitplan._base.tensors import bytes_of
from bitplan.exporters.export import export
from bitplan.exporters.targets import EXPORTERS
from bitplan.jobs.materialize import load_packed, quantize
from bitplan.models.find import find_units
from bitplan.models.fp8 import decode_fp8
from bitplan.models.load import check_model, load_model
from bitplan.models.workload import LoadedModel
from bitplan.sensitivity.estimate import profile
from bitplan.testing.plans import hand_made
from bitplan.tests.faults import tiny

IDS = torch.arange(3, 27).reshape(2, 12)


def by_hand(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """A loop over blocks."""
    found = weight.float()
    high, wide = block or tuple(weight.shape)
    for i in range(0, found.shape[0], high):
        for j in range(0, found.shape[1], wide):
            factor = scale[i // high, j // wide] if block else scale
            found[i : i + high, j : j + wide] *= factor
    return found.bfloat16().float()


def part_of(model: LoadedModel, fmt: str = "int4-g32") -> dict[str, str]:
    names = [u.name for u in find_units(model.module) if "layers.0.self_attn" in u.name]
    return dict.fromkeys(names, fmt)


@pytest.mark.parametrize("block", [(32, 64), (48, 40), None], ids=str)
def test_8_bit_floats_are_decoded_and_what_is_left_alone_stays_as_it_is(
    block: tuple[int, int] | None, tmp_path: Path
) -> None:
    folder = tiny.change(tiny.save(tmp_path / "model", "Qwen3"), tiny.to_fp8(block))
    tiny.configure(folder, quantization_config=tiny.fp8_config(block))
    stored = tiny.tensors(folder)
    model = load_model(str(folder), "cpu")
    assert model.file_bytes == (folder / "model.safetensors").stat().st_size
    weights = dict(model.module.named_parameters())
    for name in [name for name in stored if f"{name}_scale_inv" in stored]:
        expected = by_hand(stored[name], stored[f"{name}_scale_inv"], block)
        assert torch.equal(weights[name], expected), name
    chosen = part_of(model)
    quantize(hand_made(model, chosen), tmp_path / "packed", model)
    written = tiny.tensors(tmp_path / "packed")
    kept = [n for n in stored if ".layers.1." in n and "_proj.weight" in n]
    assert len(kept) == 14
    for name in kept:
        assert written[name].dtype == stored[name].dtype
        assert bytes_of(written[name]) == bytes_of(stored[name])
    packed = load_packed(tmp_path / "packed")
    again = dict(packed.module.named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    if name in again:
        assert torch.equal(again[name].float(), weights[name])
    with torch.no_grad():
        dequantized = packed.logits(IDS)
    for module, parameter in model.module.named_parameters():
        key = module.removesuffix(".weight")
        if key in chosen:
            parameter.data = dict(packed.module.named_modules())[key].weight[:]
    with torch.no_grad():
        assert torch.allclose(model.logits(IDS), dequantized, atol=1e-4)
    # For other tools: the types that they expect beside packed integers.
    export(tmp_path / "packed", "compressed-tensors", tmp_path / "out")
    others = tiny.tensors(tmp_path / "out")
    assert {t.dtype for n, t in others.items() if n in kept} == {torch.bfloat16}
    assert not [n for n in others if n.endswith("_scale_inv")]


def test_the_size_of_8_bit_floats_is_the_file_s(tmp_path: Path) -> None:
    folder = tiny.change(tiny.save(tmp_path / "model"), tiny.to_fp8((64, 64)))
    tiny.configure(folder, quantization_config=tiny.fp8_config((64, 64)))
    model = load_model(str(folder), "cpu")
    table = profile(
        model,
        [IDS],
        ("int4-g32", "keep"),
        metric="salience",
        rounding="rtn",
        include=["*layers.0.self_attn*"],
    )
    quantize(hand_made(model, part_of(model)), tmp_path / "packed", model)
    file = (tmp_path / "packed" / "model.safetensors").stat().st_size
    planned = sum(int(table.bytes[i, 0]) for i in range(len(table.units)))
    outside = table.provenance.outside_bytes or 0
    assert file <= planned + outside <= 1.2 * file


def test_scales_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2\] scales .* \[32, 32\] .* \[64, 64\]"):
        decode_fp8(torch.zeros(64, 64), torch.ones(1, 2), (32, 32))


OTHERS: dict[str, dict[str, Any]] = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}},
    "bitsandbytes": {"quantization_config": {"load_in_4bit": True}},
    "hqq": {"quantization_config": {"quant_method": "hqq"}},
    "exl3": {"quantization_config": {"quant_method": "exl3", "bits": 3.5}},
    "torchao": {"quantization_config": {"quant_method": "torchao"}},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}},
    "compressed-tensors": {
        "compression_config": {"config_groups": {}, "format": "float-quantized"}
    },
    "quark": {"text_config": {"quantization_config": {"quant_method": "quark"}}},
    "a method it does not name": {"quantization_config": {"bits": 4}},
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = tiny.configure(tiny.save(tmp_path / "model"), **OTHERS[method])
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ValueError, match=rf"quantized already \({method}") as error:
        check_model(str(folder))
    assert "\n" not in str(error.value) and "bitplan import" in str(error.value)


@pytest.mark.parametrize(
    ("file", "method"), [("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq")]
)
def test_a_file_beside_the_configuration_tells_the_method(
    file: str, method: str, tmp_path: Path
) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / file).write_text(json.dumps({"producer": {}}))
    with pytest.raises(ValueError, match=method):
        check_model(str(folder))


@pytest.mark.parametrize("to", ["compressed_tensors", "gptq", "autoround", "mlx"])
def test_what_bitplan_wrote_is_refused_by_name(to: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    model = load_model(str(folder), "cpu")
    names = [u.name for u in find_units(model.module) if "layers" in u.name]
    plan = hand_made(model, dict.fromkeys(names, "int4-g32"))
    export(plan, to, tmp_path / "out", model=model)
    with pytest.raises(ValueError, match=r"quantized already \("):
        check_model(str(tmp_path / "out"))
    # Without a word in the configuration, the tensors tell.
    tiny.configure(tmp_path / "out", quantization_config=None, quantization=None)
    (tmp_path / "out" / "quantize_config.json").unlink(missing_ok=True)
    if to != "mlx":
        with pytest.raises(ValueError, match=r"quantized already \(packed by"):
            check_model(str(tmp_path / "out"))
    assert to in EXPORTERS.names()


def test_a_packed_folder_names_its_original(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    model = load_model(str(folder), "cpu")
    quantize(hand_made(model, part_of(model)), tmp_path / "packed", model)
    with pytest.raises(ValueError, match=rf"original model, {folder}; `bitplan eval"):
        check_model(str(tmp_path / "packed"))

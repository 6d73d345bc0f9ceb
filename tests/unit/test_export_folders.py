"""Configurations and refusals of the folder targets, without the foreign tools."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.exporters.configs import folder
from bitplan.exporters.configs.gptq import name_pattern
from bitplan.exporters.export import export
from bitplan.exporters.importing import import_plan
from bitplan.exporters.targets import find
from bitplan.exporters.verify import weight_error
from bitplan.jobs.materialize import quantize
from bitplan.models.find import find_units
from bitplan.models.workload import LoadedModel, Workload
from bitplan.testing.plans import hand_made


def layers(model: LoadedModel) -> list[str]:
    return [u.name for u in find_units(model.module) if "layers" in u.name]


def configured(model: LoadedModel, formats: dict[str, str], to: str, out: Path) -> dict[str, Any]:
    export(hand_made(model, formats), to, out, model=model)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def test_patterns_speak_for_fused_names_only_if_all_agree() -> None:
    names = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]
    together = name_pattern(names[0], names)
    assert re.match(together, names[0])
    assert re.match(together, "model.layers.1.self_attn.qkv_proj")
    assert not re.match(together, names[1])
    assert not re.match(together, "model.layers.11.self_attn.q_proj")
    alone = name_pattern(names[0], names[:2])
    assert re.match(alone, names[0])
    assert not re.match(alone, "model.layers.1.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("to", "key", "symmetric", "asymmetric"),
    [
        ("gptq", "checkpoint_format", "gptq", "gptq_v2"),
        ("autoround", "packing_format", "auto_round:auto_gptq", "auto_round"),
    ],
)
def test_zero_points_choose_the_version(
    to: str, key: str, symmetric: str, asymmetric: str, wide: LoadedModel, tmp_path: Path
) -> None:
    names = layers(wide)
    same = dict.fromkeys(names, "int4-g32")
    config = configured(wide, same, to, tmp_path / "a")["quantization_config"]
    assert config[key] == symmetric
    config = configured(wide, same | {names[3]: "int8-g64-asym"}, to, tmp_path / "b")
    assert config["quantization_config"][key] == asymmetric


def test_groups_of_compressed_tensors_name_every_module_once(
    wide: LoadedModel, tmp_path: Path
) -> None:
    names = layers(wide)
    chosen = dict(zip(names, ["int4-g32", "int8-gc", "bf16"] * len(names), strict=False))
    config = configured(wide, chosen, "compressed-tensors", tmp_path / "out")
    section = config["quantization_config"]
    targets = [name for group in section["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(n for n, f in chosen.items() if f != "bf16")
    assert sorted([*targets, *section["ignore"]]) == sorted([*names, "lm_head"])
    strategies = {g["weights"]["strategy"] for g in section["config_groups"].values()}
    assert strategies == {"group", "channel"}


@pytest.mark.parametrize("to", ["compressed-tensors", "autoround", "gptq", "mlx"])
def test_a_written_folder_is_imported_as_the_plan(
    to: str, wide: LoadedModel, tmp_path: Path
) -> None:
    names = layers(wide)
    chosen = dict(zip(names, ["int4-g32", "int8-g64", "int2-g64"] * len(names), strict=False))
    export(hand_made(wide, chosen), to, tmp_path / "out", model=wide)
    assert import_plan(tmp_path / "out", wide).assignments == chosen


def test_expressions_of_autoround_are_read_as_it_reads_them(
    wide: LoadedModel, tmp_path: Path
) -> None:
    """A name counts before an expression, the first expression before later ones."""
    chosen = {
        name: "int8-g64"
        if name.endswith("down_proj")
        else "int2-g64"
        if ".layers.1." in name
        else "int4-g32"
        for name in layers(wide)
    }
    own = next(name for name in chosen if ".layers.1." in name and not name.endswith("down_proj"))
    chosen[own] = "int3-g64"
    out = tmp_path / "out"
    config = configured(wide, chosen, "autoround", out)

    def bits(fmt: str) -> dict[str, int]:
        return {"bits": int(fmt[3]), "group_size": int(fmt.split("-g")[1])}

    def imported(extra: dict[str, dict[str, int]]) -> dict[str, str]:
        config["quantization_config"] |= {**bits("int4-g32"), "extra_config": extra}
        (out / "config.json").write_text(json.dumps(config))
        return import_plan(out, wide).assignments

    expressions = {
        "layers[.]1[.": {"bits": 8},  # not valid: nothing
        "down_proj": {},  # says nothing
        "lm_head|down_proj$": bits("int8-g64"),
        r".*\.layers\.1\..*": bits("int2-g64"),
        "down_pro": bits("int2-g64"),  # later than one that matches the same
        own: bits("int3-g64"),  # a name, wherever it stands
    }
    assert imported(expressions) == chosen
    # As names alone, most would be read in the common format, which their tensors contradict.
    with pytest.raises(ValueError, match=r"down_proj|layers\.1"):
        imported({own: bits("int3-g64")})
    swapped = {key: expressions[key] for key in sorted(expressions, key="down_pro".__eq__)[::-1]}
    with pytest.raises(ValueError, match="down_proj"):
        imported(swapped)


def test_a_configuration_of_other_weights_is_noticed(wide: LoadedModel, tmp_path: Path) -> None:
    chosen = dict.fromkeys(layers(wide), "int4-g32")
    config = configured(wide, chosen, "compressed-tensors", tmp_path / "out")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="belongs to other weights"):
        import_plan(tmp_path / "out", wide)


@pytest.mark.parametrize("to", ["compressed-tensors", "autoround", "gptq", "mlx"])
def test_what_these_folders_cannot_hold_is_refused(
    to: str, wide: LoadedModel, tmp_path: Path
) -> None:
    nothing = hand_made(wide, dict.fromkeys(layers(wide), "bf16"))
    with pytest.raises(ValueError, match="nothing to quantize"):
        export(nothing, to, tmp_path / "a", model=wide)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval().requires_grad_(False)
    other = LoadedModel("mlp", module, "float32", Workload(module, calibration=[torch.ones(2, 64)]))
    with pytest.raises(ValueError, match="no causal language model"):
        export(hand_made(other, {"0": "int4-g32"}), to, tmp_path / "b", model=other)
    assert list(tmp_path.iterdir()) == []


def test_asymmetric_formats_are_refused_for_transformers_with_the_rule(
    wide: LoadedModel, tmp_path: Path
) -> None:
    name = layers(wide)[0]
    plan = hand_made(wide, {name: "int4-g32-asym"})
    with pytest.raises(ValueError, match=rf"{name} in int4-g32-asym: zero_points: .*Use int4-g32"):
        export(plan, "compressed-tensors", tmp_path / "out", model=wide)


def test_an_export_replaces_an_export_and_nothing_else(wide: LoadedModel, tmp_path: Path) -> None:
    plan = hand_made(wide, dict.fromkeys(layers(wide), "int4-g32"))
    out = tmp_path / "out"
    export(plan, "compressed-tensors", out, model=wide)
    export(plan, "mlx", out, model=wide)
    assert "quantization" in json.loads((out / "config.json").read_text())
    packed = quantize(plan, tmp_path / "packed", wide)
    with pytest.raises(ValueError, match="not an exported model"):
        export(plan, "mlx", packed, model=wide)


@pytest.mark.parametrize("to", ["compressed-tensors", "autoround", "gptq", "mlx"])
def test_large_folders_are_several_files(
    to: str, wide: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = hand_made(wide, dict.fromkeys(layers(wide), "int4-g32"))
    export(plan, to, tmp_path / "whole", model=wide)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    monkeypatch.setattr(folder, "SHARD", 200_000)
    out = tmp_path / "out"
    done = export(plan, to, out, model=wide)  # which reads it back
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert count > 3
    assert not any(path.suffix == "" for path in out.iterdir())
    found: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = load_file(out / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        modules = {name.rpartition(".")[0] for name in tensors}
        assert sum(t.nbytes for t in tensors.values()) <= 200_000 or len(modules) == 1
        found |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert index["weight_map"].keys() == found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    parts: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        parts.setdefault(name.rpartition(".")[0], set()).add(file)
    assert all(len(where) == 1 for where in parts.values())
    assert weight_error(find(to)[1], done.source, out) == 0.0


def test_no_more_than_a_file_of_tensors_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "SHARD", 10_000)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def tensors() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal most
        for i in range(40):
            made = torch.full((600,), float(i))
            alive.append(weakref.ref(made))
            most = max(most, sum(t.nbytes for ref in alive if (t := ref()) is not None))
            yield {f"{i}.weight": made}

    folder.save_tensors(tensors(), tmp_path)
    # A full file, the matrix that no longer fits, and the one the generator makes.
    assert 2400 < most <= 10_000 + 2 * 2400
    assert len(list(tmp_path.glob("*.safetensors"))) == 10


def test_mlx_finds_the_rotations_where_it_looks(tmp_path: Path) -> None:
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            rope_parameters={"rope_theta": 5e4, "rope_type": "linear", "factor": 2.0},
        )
    ).eval()
    model = LoadedModel("rope", module, "float32", Workload(module, tokenizer=None))
    config = configured(model, dict.fromkeys(layers(model), "int4-g32"), "mlx", tmp_path / "out")
    assert config["rope_theta"] == 5e4
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}

"""Nothing of a checkpoint is lost: unknown tensors, own names, fields, and files beside weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitplan.exporters.export import export
from bitplan.exporters.importing import import_plan
from bitplan.jobs.materialize import load_packed, quantize
from bitplan.models.find import find_units
from bitplan.models.load import load_model
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.search.coverage import coverage_of, describe_coverage
from bitplan.sensitivity.estimate import profile
from bitplan.testing.plans import hand_made
from bitplan.tests.faults import tiny

Edit = Callable[[dict[str, Tensor]], None]
IDS = torch.arange(3, 27).reshape(2, 12)


def add_prediction_head(state: dict[str, Tensor]) -> None:
    state["mtp.fc.weight"] = torch.randn(64, 128).bfloat16()
    state["mtp.norm.weight"] = torch.ones(64)


def add_layer_after_the_last(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".layers.1." in name]:
        state[name.replace(".layers.1.", ".layers.2.")] = -state[name]


def add_frequencies(state: dict[str, Tensor]) -> None:
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)


def attention(model: LoadedModel, fmt: str = "int4-g32") -> dict[str, str]:
    """A format for the projections of the language model's attention."""
    found = [unit.name for unit in find_units(model.module) if "self_attn" in unit.name]
    return dict.fromkeys([name for name in found if "vision" not in name], fmt)


@pytest.mark.parametrize(
    ("kind", "add"),
    [
        ("Qwen3", add_prediction_head),
        ("Llama", add_layer_after_the_last),
        ("Mistral", add_frequencies),
    ],
)
def test_tensors_unknown_to_the_architecture_are_carried_along(
    kind: str, add: Edit, tmp_path: Path
) -> None:
    folder = tiny.save(tmp_path / "model", kind)
    known = tiny.names(folder)
    tiny.change(folder, add)
    before = tiny.tensors(folder)
    model = load_model(str(folder), "cpu")
    assert model.origin is not None
    unknown = before.keys() - known
    assert {one.name for one in model.origin.carried} == unknown
    plan = hand_made(model, attention(model))
    quantize(plan, tmp_path / "packed", model)
    export(plan, "vllm", tmp_path / "exported", model=model)
    export(tmp_path / "packed", "compressed-tensors", tmp_path / "again")
    for written in ("packed", "exported", "again"):
        after = tiny.tensors(tmp_path / written)
        for name in unknown:
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name], before[name]), (written, name)
    packed = load_packed(tmp_path / "packed")
    with torch.no_grad():
        assert packed.logits(IDS).shape == (2, 12, 512)


def test_what_is_carried_is_counted_and_said(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "Qwen3")
    sizes = {}
    for name, edit in (("without", None), ("with", add_prediction_head)):
        if edit:
            tiny.change(folder, edit)
        model = load_model(str(folder), "cpu")
        table = profile(model, [IDS], ("int4-g32", "keep"), metric="salience", rounding="rtn")
        sizes[name] = table.provenance.outside_bytes or 0
    assert sizes["with"] - sizes["without"] >= 2 * 64 * 128 + 4 * 64
    said = coverage_of(table)
    assert said is not None
    assert "2 tensors that the architecture does not have (mtp.fc.weight, mtp.norm" in (
        describe_coverage(said)
    )
    names = [name for unit in table.units for name in unit.modules]
    quantize(hand_made(model, dict.fromkeys(names, "int4-g32")), tmp_path / "out", model)
    planned = sum(
        Format.parse("int4-g32").stored_bytes(shape) for u in table.units for shape in u.shapes
    )
    whole = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert whole - planned <= sizes["with"]


@pytest.mark.parametrize("kind", ["gemma", "llava", "Mixtral", "Qwen3Moe", "GPT2"])
@pytest.mark.parametrize("packed", [False, True])
def test_exports_have_the_names_and_fields_of_the_checkpoint(
    kind: str, packed: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if kind == "gemma":
        tiny.save_gemma_with_eyes(folder)
    elif kind == "llava":
        tiny.save_llava(folder)
    elif kind == "GPT2":  # as published: without the prefix of the class in memory
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        tiny.save(folder, kind, **sizes)
        tiny.change(folder, drop_prefix)
    else:
        experts = (
            {"num_local_experts": 4}
            if kind == "Mixtral"
            else {"num_experts": 4, "num_experts_per_tok": 2}
        )
        tiny.save(folder, kind, moe_intermediate_size=32, head_dim=16, **experts)
    before, fields = tiny.tensors(folder), tiny.read(folder)
    model = load_model(str(folder), "cpu")
    assert model.origin is not None and not model.origin.carried
    chosen = attention(model)
    if kind == "GPT2":
        chosen = {}
        for unit in find_units(model.module):
            if "lm_head" in (unit.name, *unit.aliases):
                chosen = {unit.name: "bf16"}
    plan = hand_made(model, chosen)
    source: Path | object = plan
    if packed:
        quantize(plan, tmp_path / "packed", model)
        assert tiny.read(tmp_path / "packed") == fields
        with torch.no_grad():
            assert load_packed(tmp_path / "packed").logits(IDS).isfinite().all()
    if kind == "GPT2":
        return
    source = tmp_path / "packed" if packed else plan
    export(source, "compressed-tensors", tmp_path / "out", model=None if packed else model)
    after = tiny.names(tmp_path / "out")
    quantized = {name.removesuffix("_packed") for name in after if name.endswith("weight_packed")}
    assert quantized <= before.keys() and len(quantized) == len(chosen)
    kept = before.keys() - quantized - {"lm_head.weight"}
    assert kept <= after
    written = tiny.tensors(tmp_path / "out")
    assert all(torch.equal(before[name], written[name]) for name in kept)
    config = tiny.read(tmp_path / "out")
    assert {key: config[key] for key in fields} == fields
    imported = import_plan(tmp_path / "out", model)
    assert imported.assignments == plan.assignments


def drop_prefix(state: dict[str, Tensor]) -> None:
    for name in list(state):
        state[name.removeprefix("transformer.")] = state.pop(name)


def test_files_beside_the_weights_are_carried_along(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    files = {
        "chat_template.jinja": "{{ messages }}",
        "preprocessor_config.json": "{}",
        "processor_config.json": '{"processor_class": "X"}',
        "generation_config.json": '{"temperature": 0.3, "top_k": 7}',
        "LICENSE": "Free.",
        "NOTICE.md": "Notice.",
        "modeling_own.py": "X = 1",
        "assets/voices.bin.txt": "1",
        "unknown.dat": "2",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    model = load_model(str(folder), "cpu")
    plan = hand_made(model, attention(model))
    quantize(plan, tmp_path / "packed", model)
    export(plan, "mlx", tmp_path / "mlx", model=model)
    export(tmp_path / "packed", "autoround", tmp_path / "again")
    for written in ("packed", "mlx", "again"):
        for name, text in files.items():
            assert (tmp_path / written / name).read_text() == text, (written, name)
        assert not (tmp_path / written / ".cache").exists()
        assert not (tmp_path / written / "pytorch_model.bin").exists()
        assert (tmp_path / written / "tokenizer.json").read_bytes() == (
            folder / "tokenizer.json"
        ).read_bytes()


def test_an_export_that_lost_a_tensor_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitplan.exporters.configs.own_names import OwnNames

    model = load_model(str(tiny.save(tmp_path / "model")), "cpu")
    plain = OwnNames.tensors

    def forgetful(self: OwnNames, others: object) -> object:
        for one in plain(self, others):  # type: ignore[arg-type]
            yield {name: t for name, t in one.items() if "embed" not in name}

    monkeypatch.setattr(OwnNames, "tensors", forgetful)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' .* is not among"):
        export(hand_made(model, attention(model)), "vllm", tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    folder = tiny.change(tiny.save(tmp_path / "model"), add_prediction_head)
    state = tiny.tensors(folder)
    (folder / "model.safetensors").unlink()
    from safetensors.torch import save_file

    places = {}
    for number, name in enumerate(state):
        places[name] = f"model-0000{number % 2 + 1}-of-00002.safetensors"
    for file in set(places.values()):
        save_file(
            {n: t for n, t in state.items() if places[n] == file}, folder / file, {"format": "pt"}
        )
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load_model(str(folder), "cpu")
    export(hand_made(model, attention(model)), "vllm", tmp_path / "out", model=model)
    assert torch.equal(tiny.tensors(tmp_path / "out")["mtp.fc.weight"], state["mtp.fc.weight"])
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_an_unfinished_checkpoint_says_what_it_lacks(tmp_path: Path) -> None:
    folder = tiny.change(tiny.save(tmp_path / "model"), lambda s: void(s, "model.norm.weight"))
    with pytest.raises(ValueError, match=re.escape("no usable tensor 'model.norm.weight'")):
        load_model(str(folder), "cpu")


def void(state: dict[str, Tensor], name: str) -> None:
    del state[name]

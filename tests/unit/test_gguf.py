"""GGUF files: names, orders of rows, metadata, imports."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bitplan.__main__ import app
from bitplan.exporters.export import export
from bitplan.exporters.importing import import_plan
from bitplan.exporters.layouts.gguf import NEAREST, TYPE_OF_FORMAT, Block, copy_with, open_reader
from bitplan.exporters.source import open_source
from bitplan.exporters.verify import compare
from bitplan.jobs.materialize import load_packed, quantize
from bitplan.models.load import load_model
from bitplan.models.workload import LoadedModel
from bitplan.search.plan import Plan
from bitplan.testing.plans import hand_made, mixed

DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="session")
def plan(wide: LoadedModel) -> Plan:
    formats = ["q3_k", "iq4_nl", "int4-g32", "q4_1", "int8-g32", "q6_k", "fp16"]
    return mixed(wide, None, formats)


@pytest.fixture(scope="session")
def exported(
    plan: Plan, wide: LoadedModel, wide_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    export(plan, "gguf", out, like=wide_gguf, model=wide)
    return out


def test_transformers_reads_the_file_as_our_dequantized_model(
    exported: Path, plan: Plan, wide: LoadedModel
) -> None:
    theirs = load_model(str(exported), "cpu")
    source = open_source(plan, model=wide)
    ids = torch.arange(64).view(2, 32)
    found = compare(source.logits, theirs.logits, [ids], 1e-10)
    assert found.agrees
    assert found.relative < 1e-5
    assert not compare(wide.logits, theirs.logits, [ids], 1e-10).agrees


def test_metadata_is_copied_and_types_are_the_plans(
    exported: Path, plan: Plan, wide_gguf: Path
) -> None:
    ours, base = open_reader(exported), open_reader(wide_gguf)
    skipped = {"GGUF.kv_count", "general.file_type"}
    for key, field in base.fields.items():
        if key not in skipped:
            assert ours.fields[key].contents() == field.contents()
            assert ours.fields[key].types == field.types
    types = {tensor.name: tensor.tensor_type.name for tensor in ours.tensors}
    assert types["blk.1.ffn_down.weight"] == TYPE_OF_FORMAT[plan.assignments[DOWN]]
    assert types["output_norm.weight"] == "F32"
    assert list(types) == [tensor.name for tensor in base.tensors]


def test_an_exported_file_imports_as_its_plan(
    exported: Path, plan: Plan, wide: LoadedModel
) -> None:
    named = import_plan(exported, wide)
    assert named.assignments == {
        name: plan.assignments[name] for name in named.assignments
    } and set(named.assignments) == set(plan.assignments)
    assert (named.bytes, named.model.sha256) == (plan.bytes, plan.model.sha256)
    unnamed = import_plan(exported)
    assert unnamed.assignments == named.assignments
    assert unnamed.model.sha256 == ""


def test_types_without_a_format_import_as_the_nearest(
    tmp_path: Path, wide: LoadedModel, wide_gguf: Path
) -> None:
    kind = gguf.GGMLQuantizationType.IQ3_S
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((512, 256 // block * size), np.uint8)
    path = tmp_path / "foreign.gguf"
    made = Block("IQ3_S", (512, 256), data)
    kinds = {"blk.0.ffn_up.weight": (made.kind, (512, 256), data.nbytes)}
    copy_with(wide_gguf, path, kinds, lambda *_: made, {})
    found = import_plan(path, wide)
    assert found.assignments["model.layers.0.mlp.up_proj"] == NEAREST["IQ3_S"] == "q3_k"
    assert "1 matrices have no exact format" in (found.note or "")


def test_a_packed_folder_exports_like_its_plan(
    exported: Path, plan: Plan, wide: LoadedModel, wide_gguf: Path, tmp_path: Path
) -> None:
    folder = quantize(plan, tmp_path / "packed", wide)
    out = tmp_path / "m.gguf"
    export(folder, "gguf", out, like=wide_gguf)
    assert out.read_bytes() == exported.read_bytes()
    ids = torch.arange(32).view(1, 32)
    ours = open_source(plan, model=wide).logits(ids)
    assert torch.allclose(load_packed(folder).logits(ids), ours, atol=1e-4)


def test_another_models_file_is_refused(
    plan: Plan, wide: LoadedModel, wide_gguf: Path, tmp_path: Path
) -> None:
    other = load_model(str(wide_gguf.parent), "cpu")
    with torch.no_grad():
        weight = dict(other.module.named_parameters())[f"{QUERY}.weight"]
        weight.copy_(weight.flip(0))
    swapped = hand_made(other, plan.assignments)
    with pytest.raises(ValueError, match=r"attn_q.weight of .* is not .*q_proj.* they differ by"):
        export(swapped, "gguf", tmp_path / "m.gguf", like=wide_gguf, model=other)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_gguf_says_what_is_missing(
    plan: Plan, wide: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"(?s)metadata.*convert_hf_to_gguf.py.*--like"):
        export(plan, "gguf", tmp_path / "m.gguf", model=wide)


def test_k_types_need_rows_of_whole_blocks(tiny: LoadedModel, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    broken = hand_made(tiny, {name: "q4_k"})
    with pytest.raises(ValueError, match="blocks: 64 input features are no multiple of 256"):
        export(broken, "gguf", tmp_path / "m.txt", plan_only=True, model=tiny)
    done = export(broken, "gguf", tmp_path / "m.txt", plan_only=True, model=tiny, round_up=True)
    assert done.changed == {name: "q4_1"}
    assert r"^blk\.0\.ffn_up\.weight$=q4_1" in (tmp_path / "m.txt").read_text()


def test_the_type_list_is_anchored_and_names_every_matrix(
    plan: Plan, wide: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "types.txt"
    partial = hand_made(wide, {DOWN: "q6_k"})
    export(partial, "gguf", out, plan_only=True, model=wide)
    lines = out.read_text().split()
    assert len(lines) == 16
    patterns = dict(line.rsplit("=", 1) for line in lines)
    name = "blk.1.ffn_down.weight"
    hits = [kind for pattern, kind in patterns.items() if re.search(pattern, name)]
    assert hits == ["q6_k"]
    assert sorted(set(patterns.values())) == ["f16", "q6_k"]


def test_the_command_line(
    plan: Plan, wide_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.save(tmp_path / "plan.json")
    out, back = tmp_path / "m.gguf", tmp_path / "back.json"
    run = CliRunner()
    words = ["export", tmp_path / "plan.json", "--to", "llama.cpp", "--out", out, "-q"]
    done = run.invoke(app, [str(word) for word in (*words, "--like", wide_gguf)])
    assert done.exit_code == 0, done.output
    assert "Read back: every matrix has" in " ".join(done.output.split())
    done = run.invoke(app, ["import", str(out), "--out", str(back)])
    assert done.exit_code == 0, done.output
    assert Plan.load(back).assignments == import_plan(out).assignments
    assert "llama.cpp" in run.invoke(app, ["exporters"], env={"COLUMNS": "200"}).output


def test_verify_says_what_to_install(
    plan: Plan, wide_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitplan.exporters.targets.gguf.Gguf.installed", lambda _: False)
    plan.save(tmp_path / "plan.json")
    words = ["export", tmp_path / "plan.json", "--to", "gguf", "--out", tmp_path / "m.gguf"]
    words += ["--like", wide_gguf, "--verify", "-q"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert "are ours, bit for bit" in done.output
    assert isinstance(done.exception, ValueError)
    assert "pip install 'bitplan[gguf]'" in str(done.exception)


def test_the_importance_matrix_holds_the_squared_inputs(wide: LoadedModel, tmp_path: Path) -> None:
    from bitplan.models.samples import calibration_samples

    plan = hand_made(wide, {DOWN: "q6_k"})
    plan.calibration.update(sequences=4, length=32, seed=3)
    done = export(plan, "imatrix", tmp_path / "imatrix.gguf", model=wide)
    reader = gguf.GGUFReader(done.path)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    inputs: list[torch.Tensor] = []
    module = wide.module.get_submodule(DOWN)
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in calibration_samples(wide, "builtin", 4, 32, 3).batches:
        wide.logits(batch)
    handle.remove()
    expected = torch.cat([x.flatten(0, -2) for x in inputs]).square().sum(0)
    assert np.allclose(found["blk.1.ffn_down.weight.in_sum2"][0], expected, rtol=1e-4)
    assert found["blk.1.ffn_down.weight.counts"].item() == 4 * 32
    assert str(reader.fields["general.type"].contents()) == "imatrix"
    assert "token_embd.weight.in_sum2" not in found
    assert len(found) == 2 * 15


def test_what_the_plan_leaves_out_is_copied_as_it_is(
    wide: LoadedModel, wide_gguf: Path, tmp_path: Path
) -> None:
    from gguf.quants import quantize as by_gguf

    base, name = tmp_path / "base.gguf", "token_embd.weight"
    rows = wide.module.get_submodule(EMBEDDING).state_dict()["weight"]
    data = by_gguf(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    made = Block("Q8_0", (512, 256), data)
    copy_with(wide_gguf, base, {name: (made.kind, (512, 256), data.nbytes)}, lambda *_: made, {})
    done = export(
        hand_made(wide, {DOWN: "q6_k"}), "gguf", tmp_path / "m.gguf", like=base, model=wide
    )
    found = {tensor.name: tensor for tensor in open_reader(done.path).tensors}
    assert found[name].tensor_type.name == "Q8_0"
    assert np.array_equal(np.array(found[name].data).reshape(-1), data.reshape(-1))
    assert done.stored == 256 * 2 * 210

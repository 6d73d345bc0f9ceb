"""GGUF files in parts, and what llama.cpp calls architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bitplan._base.progress import Reporter
from bitplan.exporters.export import export
from bitplan.exporters.importing import import_plan
from bitplan.jobs.prepare import check_runtime, prepare
from bitplan.jobs.settings import ProfileSettings
from bitplan.models.gguf_names import gguf_architecture, gguf_tensors
from bitplan.models.gguf_parts import gguf_parts, open_gguf
from bitplan.models.identity import state_sha256
from bitplan.models.load import check_model, load_model, load_structure
from bitplan.models.workload import LoadedModel
from bitplan.testing.plans import hand_made
from bitplan.tests.faults import tiny


def split(whole: Path, stem: Path, tensors: int) -> list[Path]:
    """The file in parts of so many tensors, fields in the first one."""
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(stem.with_suffix(".gguf"), "llama", split_max_tensors=tensors)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(stem.parent.glob(f"{stem.name}-*.gguf"))


@pytest.mark.parametrize(("tensors", "part"), [(8, 0), (8, -1), (5, 2)])
def test_a_file_in_parts_is_the_whole_file(
    tensors: int, part: int, wide: LoadedModel, wide_gguf: Path, tmp_path: Path
) -> None:
    parts = split(wide_gguf, tmp_path / "part", tensors)
    assert len(parts) == -(-21 // tensors) and gguf_parts(parts[part]) == tuple(parts)
    given = parts[part]
    model = load_model(str(given), "cpu")
    whole = load_model(str(wide_gguf), "cpu")
    assert state_sha256(model.module) == state_sha256(whole.module)
    assert model.file_bytes == sum(file.stat().st_size for file in parts)
    config: Any = load_structure(str(given)).module.config
    assert config.num_hidden_layers == 2
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    plan = hand_made(wide, dict.fromkeys(names, "q4_k"), "llama.cpp")
    done = export(plan, "gguf", tmp_path / "out.gguf", model=wide, like=given)
    same = export(plan, "gguf", tmp_path / "same.gguf", model=wide, like=wide_gguf)
    assert not [key for key in open_gguf(done.path).fields if key.startswith("split.")]
    first, second = (
        {t.name: (t.tensor_type, bytes(t.data)) for t in open_gguf(one.path).tensors}
        for one in (done, same)
    )
    assert first == second
    assert import_plan(given, wide).assignments == import_plan(wide_gguf, wide).assignments


def test_a_missing_or_foreign_part_is_named(wide_gguf: Path, tmp_path: Path) -> None:
    parts = split(wide_gguf, tmp_path / "part", 8)
    away = parts[1].read_bytes()
    parts[1].unlink()
    for given in (parts[0], parts[2]):
        with pytest.raises(ValueError, match=r"part-00002-of-00003.gguf is missing\. Put"):
            check_model(str(given))
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf is not part 2 of the file"):
        open_gguf(parts[0])
    parts[1].write_bytes(away)
    assert len(open_gguf(parts[0]).tensors) == 21
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ValueError, match=r"one of 3 parts.*model-00001-of-00003.gguf"):
        check_model(str(renamed))


KNOWN = {
    "cohere": "command-r",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "gpt_oss": "gpt-oss",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "falcon_h1": "falcon-h1",
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "gpt_neox": "gptneox",
    "qwen3": "qwen3",
    "hunyuan_v1_dense": "hunyuan-dense",
    "ernie4_5": "ernie4_5",
    "olmo3": "olmo2",
}


@pytest.mark.parametrize("kind", KNOWN)
def test_architectures_have_llama_cpp_s_names(kind: str) -> None:
    class Config:
        model_type, num_hidden_layers = kind, 3

    assert gguf_architecture(Config()) == (KNOWN[kind], 3)
    assert KNOWN[kind] in gguf.MODEL_ARCH_NAMES.values()


def test_modules_inside_a_model_of_images_have_names() -> None:
    names = ["model.language_model.layers.1.mlp.up_proj", "model.language_model.embed_tokens"]
    found = gguf_tensors("gemma3", 2, [*names, "model.vision_tower.layers.0.fc1"])
    assert found == {names[0]: "blk.1.ffn_up.weight", names[1]: "token_embd.weight"}


def prepared(folder: Path, **options: Any) -> Any:
    settings = ProfileSettings(
        str(folder),
        ("q8_0", "keep"),
        rounding="rtn",
        calibration="prose",
        sequences=2,
        length=16,
        device="cpu",
        **options,
    )
    return prepare(settings, Reporter(quiet=True))


@pytest.mark.parametrize("kind", ["Cohere", "Qwen3Moe"])
def test_renamed_architectures_can_be_planned_for_llama_cpp(kind: str, tmp_path: Path) -> None:
    sizes = (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        if kind == "Qwen3Moe"
        else {}
    )
    work = prepared(tiny.save(tmp_path / "m", kind, **sizes), include=("*self_attn*",))
    check_runtime(work, "llama.cpp")
    names = [unit.name for unit in work.units]
    plan = hand_made(work.model, dict.fromkeys(names, "q8_0"), "llama.cpp")
    out = tmp_path / "types.txt"
    export(plan, "gguf", out, plan_only=True, model=work.model)
    assert "^blk\\.0\\.attn_q\\.weight$=q8_0" in out.read_text()


@pytest.mark.parametrize("kind", ["OPT", "Helium"])
def test_unknown_architectures_are_refused_before_the_search(kind: str, tmp_path: Path) -> None:
    sizes = {"ffn_dim": 128, "word_embed_proj_dim": 64} if kind == "OPT" else {"head_dim": 16}
    work = prepared(tiny.save(tmp_path / "m", kind, **sizes))
    with pytest.raises(ValueError, match=rf"no architecture for models of type '{kind.lower()}'"):
        check_runtime(work, "llama.cpp")
    check_runtime(work, "mlx")

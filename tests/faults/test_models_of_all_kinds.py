"""Tokens without a row in the embedding, a checkpoint's own code, units without effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitplan._base.progress import Reporter
from bitplan.exporters.export import export
from bitplan.jobs.materialize import load_packed, quantize
from bitplan.jobs.prepare import prepare
from bitplan.jobs.settings import ProfileSettings
from bitplan.models.coverage import IDLE, Coverage
from bitplan.models.find import find_units
from bitplan.models.identity import definition_sha256
from bitplan.models.load import check_model, load_model
from bitplan.models.samples import calibration_samples, evaluation_samples
from bitplan.models.streamed import is_streamed
from bitplan.models.trust import trusting
from bitplan.models.vocabulary import check_tokens
from bitplan.testing.plans import hand_made
from bitplan.tests.faults import tiny

TEXT = "A text of some words that is long enough to give a few sequences of it. " * 20


def with_more_tokens(folder: Path, tokens: list[str]) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("token", ["<|tool_3|>", "<|im_start|>"])
def test_a_token_beyond_the_embedding_is_named(token: str, tmp_path: Path) -> None:
    folder = with_more_tokens(tiny.save(tmp_path / "m"), ["<|other|>", token])
    model = load_model(str(folder), "cpu")
    (tmp_path / "plain.txt").write_text(TEXT)
    calibration_samples(model, str(tmp_path / "plain.txt"), 4, 16)
    (tmp_path / "chat.txt").write_text(TEXT + token + TEXT)
    said = rf"Token '{token}' in .*chat.txt has id 513.* only 512 rows.* 514 tokens"
    said = said.replace("|", r"\|")
    with pytest.raises(ValueError, match=said) as error:
        calibration_samples(model, str(tmp_path / "chat.txt"), 4, 16)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=said):
        evaluation_samples(model, str(tmp_path / "chat.txt"), 64, 16)


def test_a_first_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    model = load_model(str(with_more_tokens(tiny.save(tmp_path / "m"), ["<|a|>"])), "cpu")
    check_tokens(model, [0, 511], "it")
    check_tokens(model, [], "it")
    with pytest.raises(ValueError, match="has id 512"):
        check_tokens(model, [3, 512], "it")


CONFIG = """
from transformers import {base}Config
class OwnConfig({base}Config):
    model_type = "own{base}"
"""
MODEL = """
from transformers import {base}ForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM({base}ForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(folder: Path, base: str) -> Path:
    (tiny.save(folder, base) / "configuration_own.py").write_text(CONFIG.format(base=base))
    (folder / "modeling_own.py").write_text(MODEL.format(base=base))
    own = {"AutoConfig": "configuration_own.OwnConfig"}
    own["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
    return tiny.configure(
        folder, model_type=f"own{base}", architectures=["OwnForCausalLM"], auto_map=own
    )


@pytest.mark.parametrize("base", ["Llama", "Qwen3"])
def test_own_code_runs_only_where_it_is_trusted_and_goes_along(base: str, tmp_path: Path) -> None:
    folder = with_own_code(tmp_path / "m", base)
    said = (
        r"modelling code of its own \(configuration_own.py, modeling_own.py\).*--trust-remote-code"
    )
    with pytest.raises(ValueError, match=said):
        check_model(str(folder))
    with trusting():
        model = load_model(str(folder), "cpu")
        assert type(model.module).__name__ == "OwnForCausalLM"
        names = [u.name for u in find_units(model.module) if "layers" in u.name]
        plan = hand_made(model, dict.fromkeys(names, "int4-g32"))
        quantize(plan, tmp_path / "packed", model)
        export(plan, "vllm", tmp_path / "out", model=model)
        packed = load_packed(tmp_path / "packed")
        assert type(packed.module).__name__ == "OwnForCausalLM"
    for written in (tmp_path / "packed", tmp_path / "out"):
        assert (written / "modeling_own.py").is_file() and (written / "tokenizer.json").is_file()
        assert tiny.read(written)["auto_map"]
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load_packed(tmp_path / "packed")
    before = definition_sha256(model)
    (folder / "modeling_own.py").write_text(MODEL.format(base=base) + "# changed\n")
    with trusting():
        assert definition_sha256(load_model(str(folder), "cpu")) != before


def test_own_code_runs_where_the_weights_would_not_fit(tmp_path: Path) -> None:
    folder = with_own_code(tmp_path / "m", "Llama")
    other = tiny.save(tmp_path / "known", "Phi3")  # transformers has a class of that type, too
    for name in ("configuration_own.py", "modeling_own.py"):
        (other / name).write_text((folder / name).read_text().replace("Llama", "Phi3"))
    tiny.configure(other, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    assert is_streamed(load_model(str(other), "cpu", 1).module), "not trusted: the class it has"
    for own in (folder, other):
        with (
            trusting(),
            pytest.warns(UserWarning, match="whole, .*: it has modelling code of its own"),
        ):
            assert not is_streamed(load_model(str(own), "cpu", 1).module)


def test_code_that_transformers_has_itself_needs_no_trust(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", "Phi3")
    tiny.configure(folder, auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    config: Any = load_model(str(folder), "cpu").module.config
    assert config.model_type == "phi3"


@pytest.mark.parametrize("kind", ["gemma", "llava"])
def test_units_without_effect_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    save = tiny.save_gemma_with_eyes if kind == "gemma" else tiny.save_llava
    (tmp_path / "text.txt").write_text(TEXT)
    settings = ProfileSettings(
        str(save(tmp_path / "m")),
        ("int4-g32", "int8-g32"),
        rounding="rtn",
        calibration=str(tmp_path / "text.txt"),
        sequences=2,
        length=16,
        device="cpu",
    )
    work = prepare(settings, Reporter(quiet=True))
    names = [unit.name for unit in work.units]
    assert names and not [name for name in names if "vision" in name or "multi_modal" in name]
    covered = Coverage.from_json(work.provenance.coverage or {})
    idle = [left.name for left in covered.left_out if left.reason == IDLE]
    assert [name for name in idle if "vision_tower" in name]
    covered.require("4.3bpw")  # a budget per weight is about the weights that have an effect
    with torch.no_grad():
        assert work.model.logits(work.samples.batches[0]).isfinite().all()
    assert json.dumps(work.provenance.to_json())

"""Models that stay in their files: the same as those in memory, bit for bit, in less of it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitplan._base.progress import Reporter
from bitplan.jobs.forecast import forecast
from bitplan.jobs.materialize import quantize
from bitplan.jobs.search import run_profile, run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings, memory_bytes
from bitplan.models import blockwise, mapped
from bitplan.models.borders import Borders
from bitplan.models.checkpoint import streamed_bytes, streamed_model
from bitplan.models.find import find_units
from bitplan.models.identity import definition_sha256, state_sha256
from bitplan.models.load import load_model
from bitplan.models.mapped import is_mapped
from bitplan.models.measure import measure, plan_runner
from bitplan.models.rendering import Renderer
from bitplan.models.samples import samples_from_batches
from bitplan.models.streamed import _made, float32_of, held, is_streamed, read_again
from bitplan.models.together import measure_together
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.search.budget import format_bytes
from bitplan.sensitivity.factors import Gradient
from bitplan.sensitivity.probes import label_upstream
from bitplan.sensitivity.reading import passes_for
from tests.folders import CONFIGS, save_model

FORMATS = ("int3-g32-asym", "int8-gc")
HUGE, NONE = 1 << 50, 1


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, wide_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        name: save_model(name, wide_folder, root / name, "100KB" if name == "llama" else "5GB")
        for name in CONFIGS
    }


def both(folder: Path) -> tuple[LoadedModel, LoadedModel]:
    whole, streamed = (load_model(str(folder), "cpu", memory) for memory in (HUGE, NONE))
    assert not is_streamed(whole.module) and is_streamed(streamed.module)
    return whole, streamed


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_stay_in_their_files_and_everything_is_the_same(
    name: str, folders: dict[str, Path]
) -> None:
    assert (folders[name] / "model.safetensors.index.json").exists() == (name == "llama")
    whole, streamed = both(folders[name])
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(whole.logits(ids), streamed.logits(ids))
    assert state_sha256(whole.module) == state_sha256(streamed.module)
    assert definition_sha256(whole) == definition_sha256(streamed)
    assert whole.source_dtype == streamed.source_dtype == "bfloat16"
    parameters = dict(whole.module.named_parameters())
    for key, parameter in streamed.module.named_parameters():
        if parameter.dim() > 1:
            assert is_mapped(parameter) and parameter.dtype == torch.bfloat16, key
        assert torch.equal(parameter.float(), parameters[key])
    assert find_units(whole.module) == find_units(streamed.module)
    assert streamed_bytes(folders[name]) >= 4 * sum(p.numel() for p in parameters.values())


def test_a_weight_is_float32_only_while_it_is_read(folders: dict[str, Path]) -> None:
    _, streamed = both(folders["llama"])
    module = streamed.module.get_submodule("model.layers.0.mlp.up_proj")
    parameter = module._parameters["weight"]
    assert parameter is not None and parameter.dtype == torch.bfloat16
    first, second = module.weight, module.weight
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    assert first.dtype == torch.float32 and first.data_ptr() != second.data_ptr()
    with held([parameter]):
        assert float32_of(parameter).data_ptr() == float32_of(parameter).data_ptr()
        kept = module.weight
        assert isinstance(kept, Tensor) and kept.data_ptr() == float32_of(parameter).data_ptr()
    assert torch.equal(kept, first)


def test_a_graph_keeps_no_weight_that_can_be_made_again(folders: dict[str, Path]) -> None:
    _, streamed = both(folders["llama"])
    ids = torch.arange(40).view(2, 20)
    for parameter in streamed.module.parameters():
        parameter.requires_grad_(True)
    with read_again(streamed.module):
        logits = streamed.logits(ids)
        assert len(_made) <= 1, "the last one, and no other"
        logits.sum().backward()
        assert len(_made) <= 1
    assert not _made
    for parameter in streamed.module.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32


def test_pages_are_let_go_of_and_read_again(folders: dict[str, Path]) -> None:
    _, streamed = both(folders["llama"])
    parameter = streamed.module.get_submodule("model.embed_tokens")._parameters["weight"]
    assert parameter is not None
    before = parameter.detach().clone()
    assert parameter.dtype == torch.bfloat16 and before.any()
    assert mapped._map_of(parameter) is not None and mapped._map_of(before) is None
    parameter.detach().zero_()  # to this process's pages, which go
    mapped.release(parameter)
    assert torch.equal(parameter, before)


def test_a_rendered_model_in_its_files_is_that_in_memory(folders: dict[str, Path]) -> None:
    ids = torch.arange(40).view(2, 20)
    found = []
    for model in both(folders["qwen3_moe"]):
        renderer = Renderer(model.module, find_units(model.module))
        plan = dict.fromkeys(renderer.names, Format.parse("int4-g32"))
        before = model.logits(ids)
        with renderer.applied(plan):
            found.append(model.logits(ids))
        assert torch.equal(model.logits(ids), before), "what was read before is read again"
    assert torch.equal(*found)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_profile_is_the_same_to_the_bit(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tables = []
    for memory in ("1TiB", "1MB"):
        settings = ProfileSettings(
            str(folders[name]),
            formats=FORMATS,
            sequences=6,
            rounding_sequences=6,
            length=16,
            batch_tokens=32,
            device="cpu",
            rounding="fisher_gptq" if name == "llama" else "rtn",
            memory=memory,
        )
        tables.append(run_profile(settings, tmp_path / memory, Reporter(quiet=True)))
    first, second = tables
    assert first.scores is not None and second.scores is not None
    assert np.array_equal(first.kl, second.kl) and np.array_equal(first.scores, second.scores)
    assert first.provenance.decisive() == second.provenance.decisive()


def test_each_block_is_read_once_forward_and_once_backward(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = both(folders["llama"])
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    batches = [torch.arange(8)[None] + i for i in range(5)]
    samples = samples_from_batches(batches, model, "toy", 0)
    passes = passes_for(model, renderer, units, samples)
    assert isinstance(passes, blockwise.BlockwisePass) and passes.is_blockwise
    reads: dict[str, int] = {}
    names = {p.untyped_storage().data_ptr(): n for n, p in model.module.named_parameters()}
    original = mapped.release

    def count(tensor: Tensor) -> None:
        name = names.get(tensor.untyped_storage().data_ptr(), "")
        reads[name] = reads.get(name, 0) + 1
        original(tensor)

    monkeypatch.setattr("bitplan.models.streamed.release", count)
    passes.backward((lambda logits, _: torch.ones_like(logits), lambda *_: None))
    up = "model.layers.1.mlp.up_proj.weight"
    assert reads[up] == 4, "made float32 and left, forward and backward, whatever the batches"


def test_long_texts_are_cut_and_the_scores_stay(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for limit in (1 << 26, 4 * 16 * 512 * 2):  # the second holds the logits of two samples
        monkeypatch.setattr(blockwise, "LOGITS", limit)
        _, model = both(folders["llama"])
        units = find_units(model.module)
        renderer = Renderer(model.module, units)
        ids = torch.arange(80).view(5, 16)
        samples = samples_from_batches([ids], model, "toy", 0)
        sizes: list[int] = []
        sums = torch.zeros(5, 96, 64)

        def visit(
            name: str,
            gradient: Gradient,
            who: range,
            sizes: list[int] = sizes,
            sums: Tensor = sums,
        ) -> None:
            if name == "model.layers.1.mlp.up_proj":
                sizes.append(gradient.samples)
                sums[who.start : who.stop] += gradient.gradient(slice(None))

        labels = label_upstream(torch.Generator().manual_seed(0))
        passes_for(model, renderer, units, samples).backward((labels, visit))
        found.append((sizes, sums))
    (whole, first), (cut, second) = found
    assert whole == [5] and cut == [2, 2, 1]
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6 * float(first.abs().max()))


def test_what_cannot_stay_in_its_files_is_loaded_whole_and_says_why(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["gpt2"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "unknown"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its weights are quantized"):
        streamed_model(folder)
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with (
        pytest.raises(ValueError, match="could not be loaded"),
        pytest.warns(UserWarning, match="is loaded whole, .*: it has no model.safetensors"),
    ):
        load_model(str(folder), "cpu", NONE)


def test_a_truncated_file_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((folders["gpt2"] / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"truncated: it ends before the tensor '.*' does"):
        mapped.MappedFile(path)


def test_memory_is_read_in_bytes() -> None:
    assert memory_bytes("3GiB") == 3 << 30 and memory_bytes("500MB") == 500_000_000
    with pytest.raises(ValueError, match="Cannot read the memory '4bpw'"):
        memory_bytes("4bpw")


def test_a_search_and_its_packed_folder_are_the_same(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    written = []
    for memory in ("1TiB", "1MB"):
        settings = ProfileSettings(
            str(folders["llama"]),
            formats=FORMATS,
            sequences=4,
            length=16,
            rounding="rtn",
            device="cpu",
            memory=memory,
        )
        search = SearchSettings(budget="5bpw", eval_tokens=64, refine=1, guard=8, bootstrap=0)
        run = tmp_path / memory
        plan = run_search(settings, search, run, Reporter(quiet=True))
        model = load_model(str(folders["llama"]), "cpu", memory_bytes(memory))
        out = quantize(run / "plan.json", tmp_path / f"packed {memory}", model=model)
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        assert {"model.safetensors", "config.json", "plan.json"} < files.keys()
        del files["plan.json"]  # with the time it was made
        written.append((plan, files))
    (first, whole), (second, streamed) = written
    assert first.assignments == second.assignments
    assert first.measured is not None and second.measured is not None
    assert first.measured.kl == second.measured.kl
    assert whole == streamed


def test_the_hash_of_files_is_kept_until_they_change(
    folders: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["gpt2"], folder)
    _, streamed = both(folder)
    first = state_sha256(streamed.module)
    (kept,) = (cache / "bitplan" / "hashes").iterdir()
    kept.write_text("0" * 64, "ascii")
    assert state_sha256(both(folder)[1].module) == "0" * 64, "taken from there"
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    whole, streamed = both(folder)
    changed = state_sha256(streamed.module)
    assert changed == state_sha256(whole.module) and changed not in (first, "0" * 64)


def test_states_between_blocks_are_as_they_were_put(cache: Path) -> None:
    kept = Borders(limit=40)
    states = {i: torch.arange(8.0) + i for i in range(5)}
    for i, state in states.items():
        kept.put(i, (state, None) if i == 3 else state)
    kept.put(1, states[4])
    kept.put(4, states[1])
    for i, j in ((0, 0), (1, 4), (2, 2), (3, 3), (4, 1)):
        hidden, rest = kept.get(i)
        assert torch.equal(hidden, states[j]) and rest == ((None,) if i == 3 else None)
    assert 5 not in kept and kept._end == 4 * 32, "one in memory; a slot is used again"
    with pytest.raises(ValueError, match="more than one tensor"):
        kept.put(0, (states[0], states[1]))


def test_several_plans_are_measured_together_as_one_by_one(folders: dict[str, Path]) -> None:
    _, model = both(folders["llama"])
    renderer = Renderer(model.module, find_units(model.module))
    batches = torch.arange(400).view(20, 20).split(4)
    samples = samples_from_batches(list(batches), model, "toy", 0)
    plans = {
        spec: dict.fromkeys(renderer.names, Format.parse(spec))
        for spec in ("int2-g32", "int4-g32", "int8-gc")
    }
    runs = {name: plan_runner(model, renderer, plan) for name, plan in plans.items()}
    steps: list[int] = []
    expected, ppl = measure(model, runs, samples)
    together = {name: (renderer, plan) for name, plan in plans.items()}
    found, ppl_too = measure_together(model, together, samples, lambda: steps.append(1))
    assert ppl == ppl_too and len(steps) == 4 * len(batches)
    for name, one in expected.items():
        assert np.array_equal(found[name].kl, one.kl) and found[name].tokens == one.tokens
    left, _ = measure_together(
        model, together, samples, lambda: None, lambda kl: [n for n in kl if n != "int2-g32"]
    )
    assert [len(m.kl) for m in left.values()] == [16, 20, 20]
    assert np.array_equal(left["int8-gc"].kl, expected["int8-gc"].kl)


def test_a_dry_run_says_what_a_search_would_take(
    folders: dict[str, Path],
) -> None:
    settings = ProfileSettings(str(folders["llama"]), device="cpu", memory="1MB", formats=FORMATS)
    text = "\n".join(forecast(settings, SearchSettings(budget="4bpw")))
    _, model = both(folders["llama"])
    parameters = sum(p.numel() for p in model.module.parameters())
    block = sum(p.numel() for p in model.module.get_submodule("model.layers.0").parameters())
    assert f"{parameters:,} weights, bfloat16" in text and "44 prices" in text
    assert "weights stay in their files" in text and format_bytes(4 * block) in text
    assert f"hidden states between blocks: {format_bytes(4 * 64 * 96 * 128 * 3)}" in text
    assert "profile (fisher): 12,288 tokens" in text and "read 2 times" in text
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"rounding": "gptq"}, r"statistics for gptq: [0-9,]+ tokens, .*read for every batch"),
        ({"rounding": "fisher_gptq"}, r"statistics for fisher_gptq: .* tokens, .*read 2 times"),
        ({"metric": "weight_mse"}, r"profile \(weight_mse\): no text, the weights read once"),
        ({"metric": "imatrix"}, r"profile \(imatrix\): 12,288 tokens, .*read 2 times"),
        ({"metric": "hessian_trace"}, r"\(hessian_trace\): 12,288 tokens, .*read for every batch"),
    )
    for changes, said in cases:
        other = replace(settings, **changes)
        lines = "\n".join(forecast(other, SearchSettings(budget="4bpw")))
        assert re.search(said, lines), said
    whole = "\n".join(forecast(replace(settings, memory="1TiB"), SearchSettings(budget="4bpw")))
    assert "weights are loaded whole" in whole and "read" not in whole
    assert "read some times more, for checks and trials" in text

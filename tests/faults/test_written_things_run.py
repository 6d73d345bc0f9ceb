"""What is written runs, in models whose code reads weights; tools without an answer; caches."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bitplan.exporters.export import export
from bitplan.exporters.importing import import_plan
from bitplan.exporters.targets import find
from bitplan.exporters.verify import compare
from bitplan.jobs.materialize import load_packed, quantize
from bitplan.jobs.prepare import goal_of
from bitplan.jobs.settings import SearchSettings
from bitplan.models.cache_layers import cache_layers
from bitplan.models.find import find_units
from bitplan.models.kv_cache import quantized_kv_cache
from bitplan.models.load import load_model
from bitplan.models.workload import LoadedModel, Workload
from bitplan.search.kv import KVTable
from bitplan.testing.plans import hand_made
from bitplan.tests.faults import tiny

READERS = '''
import torch, bitplan
from torch import nn
from torch.nn import functional as F

class Functional(nn.Module):
    """Multiplies by the weights itself."""
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
    def forward(self, x):
        return F.linear(torch.relu(F.linear(x, self.a.weight, self.a.bias)), self.b.weight)

class Looking(nn.Module):
    """Asks for the type and device of a weight, and ties by transposing."""
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 64)
    def forward(self, x):
        x = self.b(self.a(x.to(self.a.weight.dtype)))
        return x @ self.a.weight

def made(kind):
    torch.manual_seed(0)
    return bitplan.Workload(kind(), calibration=[torch.randn(2, 3, 32) for _ in range(4)])

def functional(): return made(Functional)
def looking(): return made(Looking)

def t5():
    import transformers as t
    torch.manual_seed(0)
    model = t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64,
        num_layers=1, num_heads=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu"))
    batch = lambda: {"input_ids": torch.randint(3, 64, (2, 6)),
                     "decoder_input_ids": torch.randint(3, 64, (2, 4))}
    return bitplan.Workload(model.eval(), calibration=[batch() for _ in range(4)])
'''


@pytest.mark.parametrize("function", ["functional", "looking", "t5"])
def test_models_that_read_a_weight_run_packed(function: str, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(READERS)
    model = load_model(f"{tmp_path}/models.py:{function}", "cpu")
    names = [unit.name for unit in find_units(model.module)]
    quantize(hand_made(model, dict.fromkeys(names, "int8-g32")), tmp_path / "packed", model)
    packed = load_packed(tmp_path / "packed")
    batch = model.workload.calibration[0]
    with torch.no_grad():
        ours, theirs = model.logits(batch), packed.logits(batch)
    assert (ours - theirs).norm() < 0.05 * ours.norm()


def test_what_does_not_run_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny.save(tmp_path / "m")), "cpu")
    plan = hand_made(model, {"model.layers.0.mlp.up_proj": "int4-g32"})

    class Broken(nn.Module):
        def forward(self, **_: Any) -> Tensor:
            return functional.linear(torch.ones(1, 2), object())  # type: ignore[arg-type]

    from bitplan.jobs import materialize

    broken = LoadedModel("x", Broken(), "float32", Workload(Broken()))
    monkeypatch.setattr(materialize, "load_packed", lambda *_, **__: broken)
    with pytest.raises(ValueError, match=r"does not run, and was not kept .TypeError"):
        quantize(plan, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_positions_that_a_tool_gives_nothing_for_are_counted() -> None:
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    silent = logits.clone()
    silent[0, 1], silent[1, 3] = -torch.inf, -torch.inf
    found = compare(lambda _: logits, lambda _: silent, [torch.zeros(2, 4)], 1e-6)
    assert (found.skipped, found.tokens, found.agrees) == (2, 6, True)
    broken = silent.clone()
    broken[1, 0] = torch.nan
    assert not compare(lambda _: logits, lambda _: broken, [torch.zeros(2, 4)], 1e-6).agrees
    nothing = torch.full_like(logits, -torch.inf)
    with pytest.raises(ValueError, match="no distribution for any of 8 tokens"):
        compare(lambda _: logits, lambda _: nothing, [torch.zeros(2, 4)], 1e-6)


class Server:
    """xllamacpp's, which gives no answer where the likeliest token is a part of a letter."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, _parameters: Any) -> None:
        pass

    def handle_completions(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        tokens = request["prompt"]
        if tokens[-1] == 7:
            form = len(tokens) % 3
            return {"choices": [[{"logprobs": None}, {}, {"logprobs": {"content": []}}][form]]}
        top = [{"id": i, "logprob": float(-i)} for i in range(8)]
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}


def test_a_partial_letter_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    class Parameters(SimpleNamespace):
        def __init__(self) -> None:
            super().__init__(model=SimpleNamespace(), cpuparams=SimpleNamespace())

    fake = SimpleNamespace(CommonParams=Parameters, Server=Server)
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    from bitplan.exporters.targets.gguf import _xllamacpp

    logits = _xllamacpp(Path("x.gguf"))(torch.tensor([[1, 7, 2], [7, 7, 7]]))
    assert logits.shape == (2, 3, 8)
    assert (logits == -torch.inf).all(-1).tolist() == [[False, True, False], [True] * 3]
    assert {request["temperature"] for request in Server.asked} == {0.0}


def group(targets: list[str], bits: int, size: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    return {"targets": targets, "weights": weights | {"group_size": size}}


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[LoadedModel, Path, dict[str, str]]:
    model = load_model(str(tiny.save(tmp_path / "m")), "cpu")
    names = [u.name for u in find_units(model.module) if "layers" in u.name]
    formats = {n: "int8-g64" if "down" in n else "int4-g64" for n in names}
    formats["model.layers.0.mlp.up_proj"] = "int8-g32"
    export(hand_made(model, formats), "compressed-tensors", tmp_path / "out", model=model)
    return model, tmp_path / "out", formats


@pytest.mark.parametrize(
    "order", [("class", "regex", "name"), ("name", "regex", "class"), ("regex", "class", "name")]
)
def test_names_count_before_expressions_and_these_before_classes(
    order: tuple[str, ...], mixed: tuple[LoadedModel, Path, dict[str, str]]
) -> None:
    model, folder, formats = mixed
    groups = {
        "class": group(["Linear"], 4, 64),
        "regex": group([r"re:.*\.down_proj$", "re:.*(x|zz)"], 8, 64),
        "name": group(["model.layers.0.mlp.up_proj"], 8, 32),
    }
    section = tiny.read(folder)["quantization_config"]
    section["config_groups"] = {f"group_{i}": groups[key] for i, key in enumerate(order)}
    tiny.configure(folder, quantization_config=section)
    assert import_plan(folder, model).assignments == formats
    assert import_plan(folder).assignments == formats
    from compressed_tensors.utils.match import match_targets

    for name, module in model.module.named_modules():
        if name in formats:
            first = match_targets(name, module, [t for g in groups.values() for t in g["targets"]])
            weights = next(g["weights"] for g in groups.values() if first[0] in g["targets"])
            assert formats[name] == f"int{weights['num_bits']}-g{weights['group_size']}"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {
                "weight": torch.ones(64, 64).to(torch.float8_e4m3fn),
                "weight_scale": torch.ones(64, 1),
            },
            "float-quantized, 8-bit float",
        ),
        (
            {"weight": torch.ones(64, 64, dtype=torch.int8), "weight_scale": torch.ones(64, 1)},
            "int-quantized, 8-bit int",
        ),
        (
            {
                "weight_packed": torch.ones(64, 32, dtype=torch.uint8),
                "weight_scale": torch.ones(64, 4),
                "weight_global_scale": torch.ones(1),
            },
            "nvfp4-pack-quantized, 4-bit float",
        ),
    ],
)
def test_an_unknown_scheme_is_named(
    parts: dict[str, Tensor],
    said: str,
    mixed: tuple[LoadedModel, Path, dict[str, str]],
    tmp_path: Path,
) -> None:
    model, folder, _ = mixed
    name = "model.layers.1.self_attn.q_proj"
    state = load_file(folder / "model.safetensors")
    state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
    state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    form, bits, kind = said.replace(",", "").replace("-bit", "").split(" ")
    section = tiny.read(folder)["quantization_config"]
    other = {"targets": [name], "format": form, "weights": {"num_bits": int(bits), "type": kind}}
    section["config_groups"]["group_9"] = other
    tiny.configure(folder, quantization_config=section)
    with pytest.raises(ValueError, match=rf"'{name}' is stored as {said}"):
        import_plan(folder, model)


CACHES: dict[str, tuple[dict[str, Any], list[tuple[int, int, int]]]] = {
    # bytes per token, tokens held of 2,048, bytes that do not grow: by layer
    "Gemma3Text": (
        {"head_dim": 16, "sliding_window": 64, "num_hidden_layers": 6},
        [*[(128, 64, 0)] * 5, (128, 2048, 0)],
    ),
    "Mistral": ({"sliding_window": 4}, [(128, 4, 0)] * 2),
    "DeepseekV3": (
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
        },
        [(80, 2048, 0)] * 2,
    ),
    "Qwen3Next": (
        {
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        [(0, 0, 3584), (128, 2048, 0)],
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_of_all_kinds_are_counted_as_they_are(kind: str) -> None:
    changes, expected = CACHES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**tiny.SIZES | changes)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = LoadedModel(kind, module, "float32", Workload(module, tokenizer=object()))
    by_hand = [token * held + state for token, held, state in expected]
    assert [layer.nbytes(2048) for layer in cache_layers(model)] == by_hand
    goal = goal_of(SearchSettings(vram="1GB", context=2048, batch=3), model)
    assert goal.cache is not None and not goal.cache.is_planned
    assert goal.cache.sizes(2048, 3)[:, 0].tolist() == [3 * size for size in by_hand]
    with quantized_kv_cache(model, dict.fromkeys(range(len(expected)), 16)):
        assert module(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("window", [2, 4, 5, 6, 7])
def test_windows_as_short_as_the_trials_are_counted(window: int) -> None:
    changes: dict[str, Any] = tiny.SIZES | {"sliding_window": window}
    config = transformers.MistralConfig(**changes)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = LoadedModel("m", module, "float32", Workload(module, tokenizer=object()))
    assert [layer.nbytes(2048) for layer in cache_layers(model)] == [128 * window] * 2


def test_recurrent_layers_beside_latent_ones_grow_no_more_than_others() -> None:
    changes, _ = CACHES["Qwen3Next"]
    latent = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}
    config = transformers.Qwen3NextConfig(**tiny.SIZES | changes | latent)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = LoadedModel("m", module, "float32", Workload(module, tokenizer=object()))
    assert [layer.per_token for layer in cache_layers(model)] == [0, 64]


def test_reordered_columns_are_imported_as_bits_alone(tmp_path: Path) -> None:
    model = load_model(str(tiny.save(tmp_path / "m")), "cpu")
    name = "model.layers.0.mlp.up_proj"
    out = tmp_path / "out"
    export(hand_made(model, {name: "int4-g32"}), "compressed-tensors", out, model=model)

    def reorder(state: dict[str, Tensor]) -> None:
        state[f"{name}.weight_g_idx"] = torch.arange(64, dtype=torch.int32) // 32

    tiny.change(out, reorder)
    assert import_plan(out, model).assignments[name] == "int4-g32"
    (stored,) = find("compressed-tensors")[1].read(out, model)
    with pytest.raises(ValueError, match=r"reordered columns \(weight_g_idx\)"):
        stored.weight()


def test_a_plain_cache_is_planned_as_before(tmp_path: Path) -> None:
    model = load_model(str(tiny.save(tmp_path / "m")), "cpu")
    goal = goal_of(SearchSettings(vram="1GB", context=100), model)
    assert goal.cache is not None and goal.cache.bits == (16, 8, 4, 2)
    assert goal.cache.sizes(100, 2).tolist() == (200 * goal.cache.bytes_per_token).tolist()
    zero = np.zeros((1, 1))
    table = KVTable(("a",), (16,), np.array([[4]]), zero, zero, windows=(10,), constants=(7,))
    assert table.sizes(100, 2).tolist() == [[94]] and table.sizes(3, 1).tolist() == [[19]]
    assert json.dumps(goal.cache.layers)
    shutil.rmtree(tmp_path / "m")

"""Folds: found by running a model, exact, and refused where something else is fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from bitplan.models.fold_tracing import find_folds, within
from bitplan.models.folds import Fold, apply_fold, effective_scale
from bitplan.models.workload import LoadedModel, Workload
from bitplan.tests.e2e.architectures import configured

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(3))
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
LLAMA = {
    "input_layernorm": QKV,
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "self_attn.v_proj": ["self_attn.o_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
}
EXPERTS = {
    "input_layernorm": QKV,
    "post_attention_layernorm": ["mlp.gate", "mlp.experts.gate_up_proj"],
    "self_attn.v_proj": ["self_attn.o_proj"],
}


def ready(module: nn.Module) -> LoadedModel:
    """A frozen model whose norms and biases are not all ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    module.requires_grad_(False).eval().float()
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return LoadedModel("toy", module, "float32", Workload(module))


def transformer(name: str) -> LoadedModel:
    torch.manual_seed(0)
    if name == "gpt2":
        config = configured(t.GPT2Config, vocab_size=128, n_embd=64, n_layer=2, n_head=4)
        return ready(t.GPT2LMHeadModel(config))
    if name == "gemma2":
        return ready(t.Gemma2ForCausalLM(configured(t.Gemma2Config, **SIZES, head_dim=16)))
    if name == "qwen3_moe":
        experts = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
        config = configured(t.Qwen3MoeConfig, **SIZES, **experts, head_dim=16)
        return ready(t.Qwen3MoeForCausalLM(config))
    config = configured(t.LlamaConfig, **SIZES, tie_word_embeddings=name == "tied")
    return ready(t.LlamaForCausalLM(config))


def of_layer(folds: list[Fold], prefix: str) -> dict[str, list[str]]:
    return {
        fold.source.removeprefix(prefix): [name.removeprefix(prefix) for name in fold.matrices]
        for fold in folds
        if fold.source.startswith(prefix)
    }


@pytest.mark.parametrize(
    ("name", "prefix", "wanted", "offset", "head"),
    [
        ("llama", "model.layers.1.", LLAMA, 0.0, ["lm_head"]),
        ("tied", "model.layers.0.", LLAMA, 0.0, None),
        ("qwen3_moe", "model.layers.1.", EXPERTS, 0.0, ["lm_head"]),
        ("gpt2", "transformer.h.0.", {"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"]}, 0.0, None),
        (
            "gemma2",
            "model.layers.0.",
            {
                key.replace("post_attention", "pre_feedforward"): value
                for key, value in LLAMA.items()
            },
            1.0,
            None,
        ),
    ],
)
def test_what_feeds_what_and_that_every_fold_is_exact(
    name: str, prefix: str, wanted: dict[str, list[str]], offset: float, head: list[str] | None
) -> None:
    model = transformer(name)
    before, weights = model.logits(IDS), model.module.state_dict()
    kept = {key: tensor.clone() for key, tensor in weights.items()}
    folds = find_folds(model, IDS)
    assert all(torch.equal(weights[key], tensor) for key, tensor in kept.items())
    assert of_layer(folds, prefix) == wanted
    norms = [fold for fold in folds if fold.offset is not None]
    assert {fold.offset for fold in norms} == {offset}
    assert next((list(f.matrices) for f in norms if "norm" in f.source[:11]), None) == head
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        for fold in folds:
            model.module.load_state_dict(kept)
            scale = torch.exp(0.7 * torch.randn(fold.channels, generator=generator))
            scale = effective_scale(model.module, fold, scale, dtype)
            apply_fold(model.module, fold, scale, dtype)
            change = (model.logits(IDS) - before).abs().max() / before.abs().max()
            assert change < 3e-6, fold.source
            changed = {k for k, v in model.module.state_dict().items() if not v.equal(kept[k])}
            assert changed >= {key for key in kept if key.removesuffix(".weight") in fold.matrices}
            if fold.offset is not None:
                norm = model.module.get_parameter(fold.source + ".weight")
                assert norm.to(dtype).float().equal(norm)


def test_heads_of_a_group_share_the_scales_of_their_values() -> None:
    folds = {fold.source: fold for fold in find_folds(transformer("llama"), IDS)}
    fold = folds["model.layers.0.self_attn.v_proj"]
    heads = torch.arange(32).view(2, 16).repeat_interleave(2, 0).reshape(-1)
    assert fold.channels == 32 and list(fold.columns) == heads.tolist()
    values = torch.arange(64.0)
    assert fold.over_channels(values)[:2].tolist() == [8.0, 9.0]  # means of 0, 16 and of 1, 17
    assert fold.over_columns(torch.arange(32.0))[16].item() == 0.0


class Side(nn.Module):
    """A norm whose output a matrix and something else read."""

    def __init__(self, side: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.side = nn.LayerNorm(8), nn.Linear(8, 12), side
        self.act, self.down = nn.ReLU(), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        fed: Tensor = self.down(self.act(self.up(x)))
        return x + fed if self.side else fed


@pytest.mark.parametrize("side", [False, True])
def test_a_norm_that_feeds_more_than_matrices_is_left_out(side: bool) -> None:
    model = ready(Side(side))
    folds = find_folds(model, torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    found = {fold.source: fold.matrices for fold in folds}
    assert found == ({} if side else {"norm": ("up",)}) | {"up": ("down",)}


def test_experts_that_no_traced_token_reaches_are_scaled_as_well() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.experts = (
                nn.LayerNorm(8),
                nn.ModuleList(nn.Linear(8, 4) for _ in range(3)),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            routed: Tensor = self.experts[1](y) if x.sum() > 0 else self.experts[2](y)
            return routed

    model = ready(Listed())
    x = torch.rand(1, 5, 8, generator=torch.Generator().manual_seed(0))
    before = model.logits(-x)
    (fold,) = find_folds(model, x)
    assert set(fold.matrices) == {"experts.0", "experts.1", "experts.2"}
    apply_fold(model.module, fold, torch.linspace(0.5, 2, 8), torch.float32)
    torch.testing.assert_close(model.logits(-x), before)


def test_folds_into_what_is_in_no_unit_are_told_apart() -> None:
    folds = find_folds(transformer("llama"), IDS)
    planned = {name for fold in folds for name in fold.matrices} - {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    _, left = within(folds, planned)
    assert [fold.source for fold in left] == [
        "model.layers.0.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.layers.1.mlp.up_proj",
    ]

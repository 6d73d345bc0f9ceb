"""Untrained language models of several architectures, in bfloat16, as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

VOCABULARY = 512


def _llama() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )


def _moe() -> PreTrainedConfig:
    options: dict[str, Any] = {"head_dim": 16}  # which the annotations do not know
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        **options,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "qwen3_moe": _moe,
}


def save_model(name: str, tokenizer: Path, out: Path, shard: str = "5GB") -> Path:
    """Write a model of a name in ``CONFIGS``, with the tokenizer of a folder.

    Files hold at most ``shard``; experts are in tensors of their own, as on the Hub.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size=shard)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    return out

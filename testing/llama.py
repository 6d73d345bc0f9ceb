"""A Llama of a few hundred thousand seeded weights with a tokenizer, as a Hugging Face folder."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from .toys import seeded

VOCABULARY = 512
LETTERS = "etaoinshrdlucmfw"  # in pairs, besides the 256 bytes, they fill the vocabulary


def save_toy_llama(
    folder: Path, *, hidden: int = 256, layers: int = 2, tied: bool = False, seed: int = 1
) -> Path:
    """Write a Llama with seeded weights and a tokenizer of bytes and pairs of letters.

    Args:
        folder: Where ``config.json``, ``model.safetensors`` and ``tokenizer.json`` go.
        hidden: Hidden size; with 256, rows are long enough for every format.
        layers: Number of decoder layers.
        tied: Whether the head is tied to the embedding.
        seed: Draws the weights, the same on every machine.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    merges = [(a, b) for a, b in product(LETTERS, repeat=2)][:-1]
    names = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    assert len(set(names)) == VOCABULARY
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    made: Any = LlamaForCausalLM(config)
    model: Any = seeded(made, hidden**-0.5, seed)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder

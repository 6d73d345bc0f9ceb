"""Inputs that are the same everywhere, to the last bit: integers times powers of two.

Normal numbers drawn by torch differ in the last bit between processors, and text that ships with
Python between its releases; here everything is drawn as integers from a stream that never changes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitplan import Format, SensitivityTable
from bitplan.models.load import load_model
from bitplan.models.units import UnitInfo
from bitplan.models.workload import LoadedModel
from bitplan.search.problem import Problem
from bitplan.sensitivity.provenance import Provenance

WORDS = ("the", "a", "model", "weight", "code", "scale", "of", "every", "stores", "row", "by", "to")
TABLE_FORMATS = (
    *(f"int{bits}-g64-asym" for bits in (2, 3, 4, 5, 6, 8)),
    *("int2-g32", "int3-gc", "int4-g32", "int4-g128"),
    *("q4_k", "q6_k", "bf16"),
)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Nearly standard normal, float32: the sum of twelve uniform 16-bit integers, exact."""
    drawn = np.random.RandomState(seed).randint(0, 1 << 16, (12, *shape)).sum(axis=0)
    return torch.from_numpy((drawn - 12 * ((1 << 16) - 1) // 2) / (1 << 16)).float()


def fill(module: nn.Module, std: float, seed: int) -> nn.Module:
    """Give every parameter drawn values; those of norms stay near one."""
    for i, (name, parameter) in enumerate(module.named_parameters()):
        drawn = normal(tuple(parameter.shape), 1000 * seed + i) * std
        parameter.data.copy_(1 + drawn if "norm" in name else drawn)
    return module.requires_grad_(False).eval()


def text(words: int, seed: int) -> str:
    """Random words, some of them often, in lines."""
    drawn = np.random.RandomState(seed).randint(0, len(WORDS), (words, 2)).min(axis=1)
    return " ".join(WORDS[i] + (".\n" if n % 11 == 10 else "") for n, i in enumerate(drawn)) + "\n"


def tokens(vocabulary: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Token ids, int64."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, vocabulary, shape)).long()


def cnn() -> nn.Module:
    """A convolution, a grouped and a pointwise one, and a linear layer; 8 x 8 RGB pictures in."""
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, groups=4, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 48, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    return fill(layers, 0.25, 3)


def llama(folder: Path, hidden: int, tied: bool) -> LoadedModel:
    """A two-layer Llama over bytes, saved as a Hub folder and loaded from it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<eos>", *alphabet, *(f"<{i}>" for i in range(512 - 1 - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    fill(model, 0.5 / hidden**0.25, 2 if tied else 1)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return replace(load_model(str(folder), "cpu"), id="frozen-llama")


def table(units: int = 30, samples: int = 8) -> SensitivityTable:
    """A table of matrices of four kinds; prices are means of exact squares, so sums are exact."""
    random = np.random.RandomState(0)
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    infos = []
    for u in range(units):
        rows, cols = (int(n) for n in 64 * random.randint(2, 20, 2))
        name = f"model.layers.{u // 4}.{kinds[u % 4]}"
        infos.append(UnitInfo(name, (name,), ((rows, cols),), kinds[u % 4], u // 4))
    formats = [Format.parse(name) for name in TABLE_FORMATS]
    bits = np.array([fmt.bits for fmt in formats])
    drawn = random.randint(1, 64, (samples, units, len(formats)))
    signs = random.choice([-1, 1], (samples, units, 1))
    scores = (signs * drawn * 2.0 ** (-7.0 - bits)).astype(np.float32)
    kl = (scores.astype(np.float64) ** 2).mean(axis=0)
    sizes = [[fmt.stored_bytes(info.shapes[0]) for fmt in formats] for info in infos]
    return SensitivityTable(
        units=tuple(infos),
        formats=TABLE_FORMATS,
        bytes=np.array(sizes, dtype=np.int64),
        kl=kl,
        stderr=kl / 4,
        scores=scores,
        provenance=Provenance.model_validate(
            {
                "model": {"id": "toy", "revision": None, "sha256": "0" * 64},
                "dtype": "bfloat16",
                "metric": "fisher",
                "rounding": "rtn",
                "calibration": {"source": "toy"},
                "versions": {},
                "outside_bytes": 12_345,
                "layer_types": {},
            }
        ),
    )


def problem() -> Problem:
    """The table's problem with all that solvers ask for, and a pinned and a restricted unit."""
    found = Problem.from_table(table())
    loss: NDArray[np.float64] = found.loss.copy()
    loss[3, :-1] = np.inf
    loss[5, 0] = np.inf
    finite = np.where(loss < np.inf, loss, 0.0)
    return replace(found, loss=loss, max_loss=float(finite.max(axis=1).sum()) / 8)

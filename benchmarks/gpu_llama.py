"""A Llama of random weights, plain or packed: what decoding takes on a device.

The same module runs both; only its linear layers differ.  Decoding keeps keys and values in
buffers of a fixed length, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from bitplan.benchmarks.gpu_cases import random_packed
from bitplan.benchmarks.gpu_timing import time_calls
from bitplan.models.packed_modules import PackedLinear

MakeLinear = Callable[[int, int, str], nn.Module]  # inputs, outputs, name


@dataclass(frozen=True, slots=True)
class Config:
    """The shape of a Llama.

    Attributes:
        hidden: Width.
        inner: Width of the MLP.
        layers: Blocks.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head: Width of a head.
        vocabulary: Tokens.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int


LLAMA_1B = Config(2048, 8192, 16, 32, 8, 64, 128256)
LLAMA_8B = Config(4096, 14336, 32, 32, 8, 128, 128256)
TINY = Config(64, 128, 1, 2, 1, 32, 128)


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width]."""
        return rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, config: Config, make: MakeLinear, name: str) -> None:
        super().__init__()
        self.config = config
        wide, narrow = config.heads * config.head, config.kv_heads * config.head
        self.input_norm, self.post_norm = Norm(config.hidden), Norm(config.hidden)
        self.q_proj = make(config.hidden, wide, f"{name}.q_proj")
        self.k_proj = make(config.hidden, narrow, f"{name}.k_proj")
        self.v_proj = make(config.hidden, narrow, f"{name}.v_proj")
        self.o_proj = make(wide, config.hidden, f"{name}.o_proj")
        self.gate_proj = make(config.hidden, config.inner, f"{name}.gate_proj")
        self.up_proj = make(config.hidden, config.inner, f"{name}.up_proj")
        self.down_proj = make(config.inner, config.hidden, f"{name}.down_proj")

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], state: State | None) -> Tensor:
        """x [samples, positions, hidden]; one position where there is a state."""
        some, positions, _ = x.shape
        normed = self.input_norm(x)

        def heads(layer: nn.Module, count: int) -> Tensor:
            out: Tensor = layer(normed)
            return out.view(some, positions, count, self.config.head).transpose(1, 2)

        kv = self.config.kv_heads
        q = _turned(heads(self.q_proj, self.config.heads), turn)
        k, v = _turned(heads(self.k_proj, kv), turn), heads(self.v_proj, kv)
        if state is None:
            shared = self.config.heads // kv
            k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.transpose(1, 2)
        else:  # the queries that share keys stand in the place of positions
            keys, values = state.kept(self, k, v)
            q = q.reshape(some, kv, -1, self.config.head)
            mixed = scaled_dot_product_attention(q, keys, values, attn_mask=state.mask())
        x = x + self.o_proj(mixed.reshape(some, positions, -1))
        normed = self.post_norm(x)
        out: Tensor = x + self.down_proj(silu(self.gate_proj(normed)) * self.up_proj(normed))
        return out


class State:
    """Keys and values so far, and the position that comes next: all of it on the device."""

    def __init__(self, model: Llama, samples: int, length: int, first: int) -> None:
        like = model.embed_tokens.weight
        shape = (samples, model.config.kv_heads, length, model.config.head)
        self.caches = {
            id(block): (like.new_zeros(shape).normal_(), like.new_zeros(shape).normal_())
            for block in model.layers
        }
        self.position = torch.full((1,), first, device=like.device)
        self.places = torch.arange(length, device=like.device)

    def kept(self, block: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, with those of this position."""
        keys, values = self.caches[id(block)]
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v)
        return keys, values

    def mask(self) -> Tensor:
        """Which places can be seen."""
        return (self.places <= self.position)[None, None, None]


class Llama(nn.Module):
    """Token ids [samples, positions] in, logits [samples, positions, vocabulary] out."""

    def __init__(self, config: Config, make: MakeLinear) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(
            Block(config, make, f"layers.{i}") for i in range(config.layers)
        )
        self.norm = Norm(config.hidden)
        self.lm_head = make(config.hidden, config.vocabulary, "lm_head")

    def forward(self, ids: Tensor, state: State | None = None) -> Tensor:
        """Logits of whole sequences, or of one position after those in a state."""
        x = self.embed_tokens(ids)
        if state is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        else:
            positions = state.position
        turn = _rotation(positions, self.config.head, x.dtype)
        for block in self.layers:
            x = block(x, turn, state)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def _rotation(positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = torch.arange(0, width, 2, device=positions.device) / width
    angles = positions[:, None].float() * 500000.0**-steps
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]


def plain_llama(config: Config, device: torch.device, dtype: torch.dtype, seed: int) -> Llama:
    """Normal weights of a trained model's size."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Llama(config, lambda k, n, _: nn.Linear(k, n, bias=False))
    model = model.to(dtype).to_empty(device=device)
    return _drawn(model)


def packed_llama(
    config: Config, device: torch.device, dtype: torch.dtype, seed: int, plan: Sequence[str]
) -> Llama:
    """Layers of random codes, made on the device one at a time; formats of a plan in turn.

    The head is in 8 bits; the embedding, which is only looked up, stays as it is.
    """
    torch.manual_seed(seed)
    like, count = torch.empty(0, dtype=dtype, device=device), 0

    def make(k: int, n: int, name: str) -> nn.Module:
        nonlocal count
        count += 1
        spec = "int8-g128-asym" if name == "lm_head" else plan[count % len(plan)]
        with torch.device("cpu"):
            layer = PackedLinear(random_packed(spec, (n, k), device, seed + count), None, like)
            layer.prepare()
        return layer

    with torch.device("meta"):
        model = Llama(config, make)
    for module in model.modules():  # what was packed is there; the rest is not yet
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    return _drawn(model)


@torch.no_grad()
def _drawn(model: Llama) -> Llama:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def speeds(
    model: Llama, device: torch.device, batches: Sequence[int], length: int, prompt: int
) -> Iterator[dict[str, Any]]:
    """Tokens per second of decoding at some batch sizes, and of a prompt.

    A step of decoding takes the most likely token of the step before; ``length`` - 1 positions
    are in the cache.  It is run from Python, and replayed as a CUDA graph.
    """
    vocabulary = model.config.vocabulary
    for batch in batches:
        state = State(model, batch, length, length - 1)
        ids = torch.randint(vocabulary, (batch, 1), device=device)

        def step(ids: Tensor = ids, state: State = state) -> None:
            ids.copy_(model(ids, state)[:, -1].argmax(-1, keepdim=True))

        timing = time_calls([step], device, 0.5)
        yield {
            "what": "decode",
            "batch": batch,
            "context": length,
            "graph_tokens_per_s": batch / timing.graph,
            "plain_tokens_per_s": batch / timing.plain,
            "finite": bool(torch.isfinite(model(ids, state)).all()),
        }
    ids = torch.randint(vocabulary, (1, prompt), device=device)
    if device.type == "cuda":
        model(ids)
    _wait(device)
    start = time.perf_counter()
    model(ids)
    _wait(device)
    seconds = time.perf_counter() - start
    yield {"what": "prompt", "batch": 1, "context": prompt, "plain_tokens_per_s": prompt / seconds}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident(model: Llama) -> int:
    """Bytes of a model that lie on its device: parameters, and packed weights laid out."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        pack = getattr(getattr(module, "_layout", None), "pack", None)
        total += 0 if pack is None else pack.nbytes
    return total

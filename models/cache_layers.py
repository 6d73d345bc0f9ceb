"""What the caches of a language model take, layer by layer, whatever kind they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import quiet
from .workload import LoadedModel

_TOKENS = (4, 6)  # two lengths tell what grows with the text from what does not
_ATTRIBUTES = ("cache", "past_key_values", "cache_params")  # as versions of transformers call it
_ITEM = 2  # bytes of an element of a 16-bit cache
_STATE_ITEM = 4  # of a recurrent state, which runtimes keep in float32


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The cache of one layer for one sequence, at 16 bits.

    Attributes:
        name: The layer.
        per_token: Bytes of every token that is held.
        window: The most tokens that are held; None for all of them.
        constant: Bytes of states that do not grow.
    """

    name: str
    per_token: int
    window: int | None = None
    constant: int = 0

    def nbytes(self, context: int) -> int:
        """Bytes for a text of so many tokens.

        >>> LayerCache("layer 0", 64, window=16).nbytes(2048)
        1024
        """
        held = context if self.window is None else min(context, self.window)
        return self.per_token * held + self.constant


def cache_layers(model: LoadedModel) -> tuple[LayerCache, ...]:
    """Run a few tokens and see what the model keeps of them.

    Sliding windows and chunks hold no more than their length, recurrent layers a state, layers
    that share another one's cache nothing. Multi-head latent attention counts as runtimes cache
    it: the latent vector and the rotary part of the key.

    Args:
        model: A decoder language model of transformers.

    Raises:
        ValueError: If it keeps no cache that can be seen.
    """
    first, second = (_kept(model, count) for count in _TOKENS)
    latent = _latent(model)
    found = []
    for index, (few, more) in enumerate(zip(first, second, strict=True)):
        if not more.tokens and not more.state:
            continue
        grown, left = divmod(more.tokens - few.tokens, _TOKENS[1] - _TOKENS[0])
        if more.window is not None and 2 <= more.window <= _TOKENS[1]:  # shorter than the trial
            grown, left = few.tokens // min(_TOKENS[0], more.window - 1), 0
        if left or grown < 0 or (grown == 0 and more.tokens):
            raise ValueError(
                f"Layer {index} of {model.id} keeps {few.tokens:,} numbers of {_TOKENS[0]} tokens "
                f"and {more.tokens:,} of {_TOKENS[1]}: no cache whose size is known for other "
                "lengths. Use --budget in place of --vram."
            )
        per_token = _ITEM * (latent if latent is not None and grown else grown)
        found.append(LayerCache(f"layer {index}", per_token, more.window, _STATE_ITEM * more.state))
    if not found:
        raise ValueError(f"{model.id} keeps no KV cache. Use --budget in place of --vram.")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Numbers that a layer keeps of a text, and its window."""

    tokens: int
    state: int
    window: int | None


def _kept(model: LoadedModel, count: int) -> list[_Kept]:
    ids = torch.zeros(1, count, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad(), quiet():
            output = model.module(input_ids=ids, use_cache=True)
    except Exception as error:
        raise ValueError(
            f"{model.id} cannot run with a KV cache ({type(error).__name__}: {error}). Use "
            "--budget in place of --vram."
        ) from error
    caches: list[Any] = [getattr(output, name, None) for name in _ATTRIBUTES]
    layers = next((cache.layers for cache in caches if hasattr(cache, "layers")), None)
    if layers is None:
        raise ValueError(
            f"{model.id} keeps its cache in a form that cannot be seen. Use --budget in place of "
            "--vram."
        )
    return [_of_layer(layer) for layer in layers]


def _of_layer(layer: Any) -> _Kept:
    keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
    tokens = sum(states.numel() for states in (keys, values) if isinstance(states, Tensor))
    named = {id(keys), id(values)}
    state = sum(_numel(v) for k, v in vars(layer).items() if id(v) not in named and "state" in k)
    window = getattr(layer, "sliding_window", None)
    return _Kept(tokens, state, None if window is None else int(window))


def _numel(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_numel, value)) if isinstance(value, list | tuple) else 0


def _latent(model: LoadedModel) -> int | None:
    """Numbers per token of multi-head latent attention; None for any other."""
    config: Any = getattr(model.module, "config", None)
    decoder = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    rank = getattr(decoder, "kv_lora_rank", None)
    return int(rank) + int(getattr(decoder, "qk_rope_head_dim", 0) or 0) if rank else None

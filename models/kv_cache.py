"""Prices of quantized KV caches: what the keys and values of a layer lose at fewer bits.

The format, written down once: a b-bit cache stores every key and every value vector of every
token and KV head on its own, as b-bit codes packed without wasted bits, and a float16 scale and a
float16 minimum per group.  A group is 64 elements when ``head_dim`` is a multiple of 64, else the
whole vector.  The value is ``minimum + scale * code``.  A 16-bit cache stores two bytes per
element and is the reference whose price is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .measure import Run, measure, standard_error
from .prefix import Prefix, States, blocks_by_count
from .samples import Samples
from .workload import Batch, LoadedModel

KV_BITS = (16, 8, 4, 2)

_GROUP_SIZE = 64
_GROUP_BYTES = 4  # a float16 scale and a float16 minimum
_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What a plain cache holds per token: in each of L layers, H keys and H values of D elements.

    Attributes:
        layers: L, the layers that cache keys and values.
        heads: H, KV heads per layer.
        head_dim: D, elements of one key or value.
    """

    layers: int
    heads: int
    head_dim: int

    def bytes_per_token(self, bits: int) -> int:
        """Exact bytes one layer stores per token, keys and values together."""
        _check_bits(bits)
        if bits == 16:
            return 2 * self.heads * self.head_dim * 2
        codes = math.ceil(self.head_dim * bits / 8)
        return 2 * self.heads * (codes + _groups(self.head_dim) * _GROUP_BYTES)


@dataclass(frozen=True, slots=True)
class KVPrices:
    """Bytes and price of every layer's cache at every width.

    Attributes:
        layers: Names of the L layers (``model.layers.0``), in the order of their indices.
        bits: The B widths.
        bytes_per_token: int64 [L, B], exact bytes per token of context and sequence in the batch.
        kl: float64 [L, B], measured KL(p_original || p) with this layer's cache alone at this
            width, mean nats per token; never negative, and 0 at 16 bits.
        stderr: float64 [L, B], standard error of ``kl`` over sequences.
        scores: float32 [N, L, B], per-sequence scores with ``kl = mean(scores**2)``, in sqrt(nats
            per token).
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    bytes_per_token: NDArray[np.int64]
    kl: NDArray[np.float64]
    stderr: NDArray[np.float64]
    scores: NDArray[np.float32]


def kv_layout(config: Any) -> KVLayout:
    """Read the shape of a plain KV cache from a model's transformers configuration.

    Raises:
        ValueError: If the model is no decoder, or its cache is not one key and one value per
            token, layer and head: sliding windows, recurrent or shared layers, latent attention.
    """
    decoder = _decoder_config(config)
    kinds = sorted({type(layer).__name__ for layer in _new_cache(config).layers} - {"DynamicLayer"})
    if kinds:
        raise ValueError(
            f"{_name(config)} has cache layers of kind {', '.join(kinds)}; only plain "
            "full-attention layers, whose cache grows with every token, can be quantized. Leave "
            "the KV cache at 16 bits."
        )
    if getattr(decoder, "kv_lora_rank", None):
        raise ValueError(
            f"{_name(config)} uses multi-head latent attention (kv_lora_rank "
            f"{decoder.kv_lora_rank}): runtimes cache a compressed latent, not keys and values. "
            "Leave the KV cache at 16 bits."
        )
    attention_heads = getattr(decoder, "num_attention_heads", None)
    if attention_heads is None:
        raise ValueError(
            f"{_name(config)} has no attention heads, hence no KV cache. Leave it at 16 bits."
        )
    fewer = getattr(decoder, "num_key_value_heads", None) or getattr(decoder, "num_kv_heads", None)
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // attention_heads
    return KVLayout(decoder.num_hidden_layers, fewer or attention_heads, head_dim)


def kv_bytes_per_token(config: Any, bits: Sequence[int] = KV_BITS) -> NDArray[np.int64]:
    """Exact bytes per token of every layer's cache at every width: int64 [L, B].

    Multiply by context length and batch size for the bytes of a whole cache.

    Raises:
        ValueError: As :func:`kv_layout`, or for a width that is not 16 or 1 ... 8.
    """
    layout = kv_layout(config)
    row = [layout.bytes_per_token(width) for width in bits]
    return np.tile(np.array(row, dtype=np.int64), (layout.layers, 1))


def quantize_states(states: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round keys or values to the b-bit format.

    Args:
        states: Keys or values [..., head_dim].
        bits: b, from 1 to 8.

    Returns:
        Codes below 2^b [..., head_dim] in uint8, and scales and minima [..., groups] in float16.
    """
    levels = 2**bits - 1
    grouped = states.unflatten(-1, (_groups(states.shape[-1]), -1))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    minimum = low.half()
    scale = ((high - minimum) / levels).half().clamp_min(_SMALLEST_SCALE)
    codes = ((grouped - minimum) / scale).round_().clamp_(0, levels)
    return codes.byte().flatten(-2), scale.squeeze(-1), minimum.squeeze(-1)


def dequantize_states(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Invert :func:`quantize_states` up to rounding: float32 [..., head_dim]."""
    grouped = codes.unflatten(-1, (scale.shape[-1], -1))
    states: Tensor = minimum.unsqueeze(-1).float() + scale.unsqueeze(-1).float() * grouped
    return states.flatten(-2)


def fake_quantize(states: Tensor, bits: int) -> Tensor:
    """Keys or values [..., head_dim] as a b-bit cache gives them back; unchanged at 16 bits."""
    if bits == 16:
        return states
    return dequantize_states(*quantize_states(states, bits)).to(states.dtype)


@contextmanager
def quantized_kv_cache(model: LoadedModel, bits_per_layer: Mapping[int, int]) -> Iterator[None]:
    """Let the model attend to a quantized KV cache inside the block.

    Every forward pass starts with an empty cache and stores its keys (after the rotary embedding)
    and values at the widths given; attention reads all positions from there.  The current one is
    among them, which is slightly pessimistic for runtimes that attend to it before rounding it.
    Composes with rendered weights.

    Args:
        model: A decoder language model of transformers with a plain cache.
        bits_per_layer: Layer index -> width; layers not named keep 16 bits.

    Raises:
        ValueError: If the model has no plain cache (see :func:`kv_layout`), a width or layer does
            not exist, or, during a forward pass, the cache is not what the configuration says.
    """
    if not model.is_language_model:
        raise ValueError(
            f"{model.id!r} is not a language model, so it has no KV cache to quantize."
        )
    config = getattr(model.module, "config", None)
    widths = {layer: bits for layer, bits in bits_per_layer.items() if bits != 16}
    if not widths:  # what every cache is, of whatever kind
        yield
        return
    layout = kv_layout(config)
    for layer, bits in widths.items():
        _check_bits(bits)
        if not 0 <= layer < layout.layers:
            raise ValueError(f"There is no layer {layer}; the layers are 0 to {layout.layers - 1}.")
    written: set[int] = set()

    def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        written.clear()
        cache = _new_cache(config)
        store = cache.update

        def update(keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
            _check_states(keys, values, layer_idx, layout)
            written.add(layer_idx)
            bits = widths.get(layer_idx, 16)
            return store(
                fake_quantize(keys, bits), fake_quantize(values, bits), layer_idx, *rest, **more
            )

        cache.update = update
        return args, kwargs | {"past_key_values": cache, "use_cache": True}

    def leave(*_: Any) -> None:
        if absent := sorted(widths.keys() - written):
            raise ValueError(
                f"Layer {absent[0]} of {model.id!r} stored nothing in the KV cache, so its width "
                "means nothing. The model keeps its state elsewhere; leave the KV cache at 16 bits."
            )

    handles = [
        model.module.register_forward_pre_hook(enter, with_kwargs=True),
        model.module.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kv_runner(model: LoadedModel, bits_per_layer: Mapping[int, int], run: Run | None = None) -> Run:
    """A candidate for :func:`~.evaluate.measure`: the model with a quantized KV cache.

    Args:
        model: See :func:`quantized_kv_cache`.
        bits_per_layer: Layer index -> width; layers not named keep 16 bits.
        run: What to run with that cache, such as a ``plan_runner`` of the same model; the model
            with its original weights by default.
    """
    inner = run or model.logits

    def quantized(batch: Batch) -> Tensor:
        with quantized_kv_cache(model, bits_per_layer):
            return inner(batch)

    return quantized


def price_kv(
    model: LoadedModel,
    samples: Samples,
    bits: Sequence[int] = KV_BITS,
    advance: Callable[[], None] = lambda: None,
) -> KVPrices:
    """Measure what each layer's cache costs at each width alone, all others at 16 bits.

    The KL is exact, against the original's log-probabilities of the same batch.  Blocks before
    the quantized layer are not run again: their outputs are those of the original, which halves
    the work and takes the memory of one batch's hidden states in all layers.

    Args:
        model: A decoder language model of transformers with a plain cache.
        samples: Batches of token ids.
        bits: The B widths.
        advance: Called after every forward pass, 1 + L * (number of widths below 16) times per
            batch.

    Raises:
        ValueError: See :func:`quantized_kv_cache`.
    """
    sizes = kv_bytes_per_token(getattr(model.module, "config", None), bits)
    blocks = blocks_by_count(model.module, len(sizes))
    prefix = Prefix(blocks.values())
    states: States = {}  # the original's on the batch at hand

    def original(batch: Batch) -> Tensor:
        states.clear()  # before the next batch's are there
        logits, found = prefix.run(model.logits, batch, keep=range(1, len(blocks)))
        states.update(found)
        return logits

    def resumed(layer: int, run: Run) -> Run:
        def later_blocks(batch: Batch) -> Tensor:
            return prefix.run(run, batch, states, layer if layer in states else 0)[0]

        return later_blocks

    candidates = {
        f"{layer} {width}": resumed(layer, kv_runner(model, {layer: width}))
        for layer in range(len(sizes))
        for width in bits
        if width != 16
    }
    measured, _ = measure(model, candidates, samples, advance, original)
    kl = np.zeros((samples.count, *sizes.shape))
    for layer, column in np.ndindex(*sizes.shape):
        measurement = measured.get(f"{layer} {bits[column]}")
        if measurement is not None:
            # A KL is never negative, but float32 rounds tiny ones to either side of zero.
            kl[:, layer, column] = measurement.kl.clip(0)
    return KVPrices(
        layers=tuple(blocks) or tuple(f"layers.{layer}" for layer in range(len(sizes))),
        bits=tuple(bits),
        bytes_per_token=sizes,
        kl=kl.mean(0),
        stderr=np.apply_along_axis(standard_error, 0, kl),
        scores=np.sqrt(kl).astype(np.float32),
    )


def _groups(head_dim: int) -> int:
    return head_dim // _GROUP_SIZE if head_dim % _GROUP_SIZE == 0 else 1


def _check_bits(bits: int) -> None:
    if bits != 16 and not 1 <= bits <= 8:
        raise ValueError(f"A KV cache of {bits} bits does not exist. Use 16, or 1 to 8.")


def _check_states(keys: Tensor, values: Tensor, layer: int, layout: KVLayout) -> None:
    expected = (layout.heads, layout.head_dim)
    found = [(states.shape[1], states.shape[-1]) for states in (keys, values)]
    if found != [expected, expected]:
        raise ValueError(
            f"Layer {layer} caches keys {list(found[0])} and values {list(found[1])} (heads, "
            f"elements) per token, but the configuration says {list(expected)} for both. Such a "
            "cache cannot be quantized; leave it at 16 bits."
        )


def _decoder_config(config: Any) -> Any:
    if not hasattr(config, "get_text_config"):
        raise ValueError(
            "The model has no transformers configuration, so the shape of its KV cache is unknown. "
            "Leave the KV cache at 16 bits."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"{_name(config)} is an encoder-decoder model, whose two caches are not supported. "
            "Leave the KV cache at 16 bits."
        )
    return config.get_text_config(decoder=True)


def _new_cache(config: Any) -> Any:
    from transformers import DynamicCache  # as slow to import as torch, and seldom needed

    return DynamicCache(config=config)


def _name(config: Any) -> str:
    return f"A model of type {config.model_type!r}"

"""Quantized KV caches: the format, its bytes, where it acts in a model, and its prices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from bitplan.models.find import find_units
from bitplan.models.kv_cache import (
    KV_BITS,
    dequantize_states,
    fake_quantize,
    kv_bytes_per_token,
    kv_layout,
    kv_runner,
    price_kv,
    quantize_states,
    quantized_kv_cache,
)
from bitplan.models.measure import measure, plan_runner
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, evaluation_samples
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import pack_bits
from tests.toys import softmax_regression


def states(head_dim: int, tokens: int = 50) -> torch.Tensor:
    """Keys [2 sequences, 3 heads, tokens, head_dim] with a few channels far from zero."""
    keys = torch.randn(2, 3, tokens, head_dim, generator=torch.Generator().manual_seed(0))
    keys[..., ::7] += 5.0
    return keys


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 64), (128, 64), (192, 64), (80, 80), (8, 8)])
def test_every_element_is_within_half_a_step(bits: int, head_dim: int, group: int) -> None:
    keys = states(head_dim)
    grouped = keys.double().unflatten(-1, (-1, group))
    span = grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)
    rounded = fake_quantize(keys, bits).double().unflatten(-1, (-1, group))
    # A float16 minimum and scale are off by at most 2^-11 of themselves.
    slack = (grouped.abs().amax(-1, keepdim=True) + span) * 2.0**-11 * 1.01
    error = (rounded - grouped).abs()
    assert (error <= span / (2**bits - 1) / 2 + slack).all()
    assert error.mean() > span.mean() / (2**bits - 1) / 16, "it is not the identity"


def test_constant_and_tiny_vectors_survive() -> None:
    constant = torch.full((1, 1, 1, 64), 3.14159)
    torch.testing.assert_close(fake_quantize(constant, 2), constant, rtol=2**-11, atol=0)
    assert torch.equal(fake_quantize(torch.zeros(1, 1, 1, 64), 4), torch.zeros(1, 1, 1, 64))
    tiny = torch.randn(1, 1, 1, 64) * 1e-9
    assert fake_quantize(tiny, 4).abs().max() < 2e-7


def test_sixteen_bits_are_the_identity() -> None:
    keys = states(64)
    assert torch.equal(fake_quantize(keys, 16), keys)


@pytest.mark.parametrize("head_dim", [64, 128, 80, 20])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_bytes_are_those_of_the_packed_tensors(head_dim: int, bits: int) -> None:
    heads, layers = 3, 5
    config = transformers.LlamaConfig(
        hidden_size=6 * head_dim,
        num_attention_heads=6,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
    )
    one_token = states(head_dim, tokens=1)[0, :, 0]  # [heads, head_dim]
    stored = 0
    for vectors in (one_token, -one_token):  # keys, values
        codes, scale, minimum = quantize_states(vectors, bits)
        assert (codes.dtype, scale.dtype, minimum.dtype) == (
            torch.uint8,
            torch.float16,
            torch.float16,
        )
        assert torch.equal(dequantize_states(codes, scale, minimum), fake_quantize(vectors, bits))
        stored += pack_bits(codes, bits).nbytes + scale.nbytes + minimum.nbytes
    expected = np.array([[2 * heads * head_dim * 2, stored]] * layers)
    sizes = kv_bytes_per_token(config, (16, bits))
    assert sizes.dtype == np.int64
    np.testing.assert_array_equal(sizes, expected)


def test_bytes_of_a_known_model() -> None:
    """Three KV heads of 64 elements: 2 x 3 vectors of 128, 68, 36 and 20 bytes."""
    config = transformers.LlamaConfig(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30
    )
    np.testing.assert_array_equal(kv_bytes_per_token(config), [[768, 408, 216, 120]] * 30)


@pytest.fixture
def samples(tiny: LoadedModel) -> Samples:
    return evaluation_samples(tiny, tokens=256, length=32, batch_tokens=128)


def run(model: LoadedModel, ids: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(ids)


def test_a_cache_of_sixteen_bits_changes_nothing(tiny: LoadedModel, samples: Samples) -> None:
    ids = samples.batches[0]
    with torch.no_grad():
        assert torch.equal(kv_runner(tiny, {0: 16})(ids), run(tiny, ids))
        assert not torch.equal(kv_runner(tiny, {0: 8})(ids), run(tiny, ids))
        assert torch.equal(kv_runner(tiny, {})(ids), run(tiny, ids)), "hooks are gone"


def test_attention_reads_rotated_keys_and_values_at_the_widths_of_their_layer(
    tiny: LoadedModel, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, widths = samples.batches[0], [3, 2]
    with torch.no_grad():
        quantized = kv_runner(tiny, dict(enumerate(widths)))(ids)

    rotate = modeling_llama.apply_rotary_pos_emb
    layer = iter(widths)

    def rotate_and_round(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = rotate(*args, **kwargs)
        return queries, fake_quantize(keys, next(layer))

    def round_values(bits: int) -> Any:
        def hook(_module: Any, _args: Any, values: torch.Tensor) -> torch.Tensor:
            return fake_quantize(values.unflatten(-1, (2, 16)), bits).flatten(-2)

        return hook

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_round)
    for index, bits in enumerate(widths):
        projection = tiny.module.get_submodule(f"model.layers.{index}.self_attn.v_proj")
        projection.register_forward_hook(round_values(bits))
    torch.testing.assert_close(run(tiny, ids), quantized)


def test_a_quantized_cache_composes_with_rendered_weights(
    tiny: LoadedModel, samples: Samples
) -> None:
    ids, widths = samples.batches[0], {0: 4, 1: 2}
    renderer = Renderer(tiny.module, find_units(tiny.module))
    plan = dict.fromkeys(renderer.names, Format.parse("int3-g32-asym"))
    with torch.no_grad():
        both = kv_runner(tiny, widths, plan_runner(tiny, renderer, plan))(ids)
        with quantized_kv_cache(tiny, widths), renderer.applied(plan):
            assert torch.equal(tiny.logits(ids), both)
        weights_alone = plan_runner(tiny, renderer, plan)(ids)
        for name in renderer.names:
            renderer.weight(name).copy_(renderer.render(name, plan[name]))
        torch.testing.assert_close(kv_runner(tiny, widths)(ids), both)
    assert not torch.equal(both, weights_alone)


def test_prices_are_the_kl_of_one_layer_at_a_time(tiny: LoadedModel, samples: Samples) -> None:
    steps: list[int] = []
    first_block = tiny.module.get_submodule("model.layers.0.self_attn")
    runs: list[int] = []
    handle = first_block.register_forward_hook(lambda *_: runs.append(1))
    prices = price_kv(tiny, samples, advance=lambda: steps.append(1))
    handle.remove()

    assert len(steps) == len(samples.batches) * (1 + 2 * 3)
    assert len(runs) == len(samples.batches) * (1 + 3), "layer 1 is priced without block 0"
    assert not any("forward" in vars(module) for module in tiny.module.modules())

    pairs = [(layer, bits) for layer in (0, 1) for bits in (8, 4, 2)]
    runners = {f"{layer}/{bits}": kv_runner(tiny, {layer: bits}) for layer, bits in pairs}
    slow, _ = measure(tiny, runners, samples)
    for layer, bits in pairs:
        column = prices.bits.index(bits)
        expected = slow[f"{layer}/{bits}"]
        assert prices.kl[layer, column] == pytest.approx(expected.mean_kl, rel=1e-6)
        assert prices.stderr[layer, column] == pytest.approx(expected.kl_stderr, rel=1e-6)


def test_prices_fall_with_bits_and_sixteen_are_free(tiny: LoadedModel, samples: Samples) -> None:
    prices = price_kv(tiny, samples)
    assert prices.layers == ("model.layers.0", "model.layers.1")
    assert prices.bits == KV_BITS
    np.testing.assert_array_equal(prices.bytes_per_token, kv_bytes_per_token(tiny.module.config))
    assert (prices.kl[:, 0] == 0).all()
    assert (prices.stderr[:, 0] == 0).all()
    assert (prices.kl >= 0).all()
    assert (np.diff(prices.kl, axis=1) > 0).all()
    assert (prices.stderr[:, 1:] > 0).all()
    assert prices.scores.shape == (samples.count, 2, 4)
    np.testing.assert_allclose((prices.scores.astype(float) ** 2).mean(0), prices.kl, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.MistralConfig(sliding_window=64), "DynamicSlidingWindowLayer"),
        (transformers.MambaConfig(num_hidden_layers=2), "LinearAttentionLayer"),
        (transformers.JambaConfig(), "LinearAttentionLayer"),
        (transformers.DeepseekV3Config(), "latent attention"),
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.RwkvConfig(), "no attention heads"),
        (None, "no transformers configuration"),
    ],
)
def test_caches_that_are_not_plain_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        kv_layout(config)


def test_a_model_without_text_is_refused() -> None:
    model, batches = softmax_regression()
    with pytest.raises(ValueError, match="not a language model"):
        kv_runner(model, {0: 4})(batches[0])


def test_a_cache_unlike_its_configuration_is_refused(tiny: LoadedModel, samples: Samples) -> None:
    tiny.module.config.num_key_value_heads = 4  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"caches keys \[2, 16\].* says \[4, 16\]"):
        price_kv(tiny, samples)
    assert not tiny.module._forward_pre_hooks


def test_a_model_that_does_not_use_the_cache_is_refused(tiny: LoadedModel) -> None:
    config = transformers.XLNetConfig(vocab_size=512, d_model=32, n_layer=2, n_head=2, d_inner=32)
    module = transformers.XLNetLMHeadModel(config).eval()
    model = LoadedModel("other", module, "float32", Workload(module, tokenizer=object()))
    with pytest.raises(ValueError, match="Layer 1 of 'other' stored nothing"):
        kv_runner(model, {1: 4})(torch.zeros(1, 4, dtype=torch.long))


def test_widths_and_layers_that_do_not_exist_are_refused(
    tiny: LoadedModel, samples: Samples
) -> None:
    with pytest.raises(ValueError, match="12 bits does not exist"):
        kv_runner(tiny, {0: 12})(samples.batches[0])
    with pytest.raises(ValueError, match="no layer 2; the layers are 0 to 1"):
        kv_runner(tiny, {2: 4})(samples.batches[0])
    with pytest.raises(ValueError, match="12 bits does not exist"):
        price_kv(tiny, samples, bits=(16, 12))

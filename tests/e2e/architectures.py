"""Tiny seeded models of many architectures, made from their configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn

from bitplan.models.workload import Workload

VOCABULARY = 128


def configured(kind: Any, **options: Any) -> Any:
    """A configuration; some take options that their signatures do not name."""
    return kind(**options)


def _ids(length: int = 10, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (2, length), generator=generator) for _ in range(count)]


def _spread(model: nn.Module) -> nn.Module:
    """Weights as large as trained ones, so that every path matters."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.08:
                fan = parameter.shape[-1] ** -0.5
                parameter.copy_(fan * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _causal(config: Any, kind: Any) -> Workload:
    torch.manual_seed(0)
    return Workload(_spread(kind(config)), calibration=_ids())


def llama() -> Workload:
    config = t.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return _causal(config, t.LlamaForCausalLM)


def gpt2() -> Workload:
    config = t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return _causal(config, t.GPT2LMHeadModel)


def gemma3() -> Workload:
    config = t.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return _causal(config, t.Gemma3ForCausalLM)


def falcon() -> Workload:
    config = t.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
    )
    return _causal(config, t.FalconForCausalLM)


def mixtral() -> Workload:
    config = t.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return _causal(config, t.MixtralForCausalLM)


def qwen3_moe() -> Workload:
    config = configured(
        t.Qwen3MoeConfig,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    return _causal(config, t.Qwen3MoeForCausalLM)


def gpt_oss() -> Workload:
    config = t.GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    return _causal(config, t.GptOssForCausalLM)


def mamba() -> Workload:
    config = t.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, expand=2
    )
    return _causal(config, t.MambaForCausalLM)


def t5() -> Workload:
    torch.manual_seed(0)
    config = configured(
        t.T5Config,
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    model = _spread(t.T5ForConditionalGeneration(config))
    pairs = zip(_ids(12), _ids(8), strict=True)
    return Workload(model, calibration=[{"input_ids": a, "decoder_input_ids": b} for a, b in pairs])


def bert() -> Workload:
    torch.manual_seed(0)
    config = configured(
        t.BertConfig,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        num_labels=5,
    )
    model = _spread(t.BertForSequenceClassification(config))
    return Workload(model, calibration=[{"input_ids": ids} for ids in _ids()])


def vit() -> Workload:
    torch.manual_seed(0)
    config = configured(
        t.ViTConfig,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    model = _spread(t.ViTForImageClassification(config))
    return Workload(model, calibration=[torch.randn(2, 3, 16, 16) for _ in range(2)])


def whisper() -> Workload:
    torch.manual_seed(0)
    config = t.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = _spread(t.WhisperForConditionalGeneration(config))
    batches = [
        {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids[:, :8]} for ids in _ids()
    ]
    return Workload(model, calibration=batches)


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does, like those of EfficientNet ports."""

    def forward(self, x: Tensor) -> Tensor:
        size, step = self.kernel_size[0], self.stride[0]
        missing = [max((-(-n // step) - 1) * step + size - n, 0) for n in x.shape[-2:]]
        pads = [p for n in reversed(missing) for p in (n // 2, n - n // 2)]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


class Inverted(nn.Module):
    """A block of MobileNet and EfficientNet."""

    def __init__(self, width: int, step: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.depth = Same(2 * width, 2 * width, 3, step, groups=2 * width, bias=False)
        self.narrow = nn.Conv2d(2 * width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.narrow(F.silu(self.depth(F.silu(self.widen(x))))))
        return x + y if self.step == 1 else y


def mobilenet() -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(
        Same(3, 16, 3, 2),
        nn.SiLU(),
        Inverted(16, 1),
        Inverted(16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return Workload(model.eval(), calibration=[torch.randn(2, 3, 16, 16) for _ in range(2)])


class Speaker(nn.Module):
    """A speaker encoder: a LSTM over frames, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 24, num_layers=2, batch_first=True)
        self.gru = nn.GRU(24, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 10)

    def forward(self, frames: Tensor) -> Tensor:
        hidden, _ = self.lstm(frames)
        logits: Tensor = self.head(self.gru(hidden)[0].mean(1))
        return logits


def lstm() -> Workload:
    torch.manual_seed(0)
    return Workload(Speaker().eval(), calibration=[torch.randn(2, 7, 12) for _ in range(2)])


class Encoder(nn.Module):
    """Attention of torch, which reads the weights of its output layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 48, batch_first=True) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.embed.weight)  # a head that is tied in code


def torch_encoder() -> Workload:
    torch.manual_seed(0)
    return Workload(Encoder().eval(), calibration=_ids())


class Signals(nn.Module):
    """Convolutions in one and three dimensions, and transposed ones with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 8, 4, 2, groups=2)
        self.cube = nn.Conv3d(1, 4, 3, padding="same", padding_mode="circular")
        self.scale = nn.Parameter(torch.randn(1, 8, 1))
        self.head = nn.Bilinear(8, 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        line = F.relu(self.up(F.relu(self.line(x)))) * self.scale
        cube = F.relu(self.cube(x.reshape(len(x), 1, 4, 2, -1))).flatten(2).mean(-1)
        logits: Tensor = self.head(line.mean(-1), cube)
        return logits


def signals() -> Workload:
    torch.manual_seed(0)
    return Workload(Signals().eval(), calibration=[torch.randn(2, 4, 8) for _ in range(2)])


class Routed(nn.Module):
    """A list of experts, to each of which only some tokens go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(4)
        )
        self.head = nn.Linear(32, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        weight, chosen = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, token, weight[token, place, None] * expert(x[token]))
        logits: Tensor = self.head(x + y).unflatten(0, ids.shape)
        return logits


def routed() -> Workload:
    torch.manual_seed(0)
    return Workload(Routed().eval(), calibration=_ids())


ARCHITECTURES: dict[str, Callable[[], Workload]] = {
    make.__name__: make
    for make in (
        llama,
        gpt2,
        gemma3,
        falcon,
        mixtral,
        qwen3_moe,
        gpt_oss,
        mamba,
        t5,
        bert,
        vit,
        whisper,
        mobilenet,
        lstm,
        torch_encoder,
        signals,
        routed,
    )
}

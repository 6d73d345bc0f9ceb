"""Folders with tiny seeded checkpoints of several architectures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitplan.testing.llama import save_toy_llama

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EYES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def save(folder: Path, kind: str = "Llama", **changes: Any) -> Path:
    """A causal language model of transformers in bfloat16, with a tokenizer."""
    save_toy_llama(folder, hidden=64)  # its tokenizer
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return _save(transformers.AutoModelForCausalLM.from_config(config), folder)


def save_gemma_with_eyes(folder: Path) -> Path:
    """A Gemma 3 of images and text."""
    save_toy_llama(folder, hidden=64)
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=SIZES | {"head_dim": 16, "sliding_window": 64},
        vision_config=_EYES,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=3,
        eoi_token_index=4,
    )
    return _save(transformers.Gemma3ForConditionalGeneration(config), folder)


def save_llava(folder: Path) -> Path:
    """A Llava, which is no causal language model by its class."""
    save_toy_llama(folder, hidden=64)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=SIZES | {"model_type": "llama"},
        vision_config=_EYES | {"model_type": "clip_vision_model"},
        image_token_index=5,
    )
    return _save(transformers.LlavaForConditionalGeneration(config), folder)


def _save(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder with one file."""
    return load_file(folder / "model.safetensors")


def names(folder: Path) -> set[str]:
    """Names of all tensors of a folder."""
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= set(opened.keys())
    return found


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of a folder in place."""
    state = tensors(folder)
    edit(state)
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def configure(folder: Path, **entries: Any) -> Path:
    """Add entries to config.json; those that are None are taken out."""
    config = read(folder) | entries
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def read(folder: Path) -> dict[str, Any]:
    """config.json."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def to_fp8(block: tuple[int, int] | None) -> Callable[[dict[str, Tensor]], None]:
    """Store projections as 8-bit floats with a scale per block, or one for all."""

    def edit(state: dict[str, Tensor]) -> None:
        for name in [n for n in state if n.endswith("_proj.weight")]:
            weight = state[name].float()
            rows, cols = weight.shape
            high, wide = block or (rows, cols)
            scale = torch.zeros(-(-rows // high), -(-cols // wide))
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    part = weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                    scale[i, j] = part.abs().max() / 448
                    part /= scale[i, j]
            state[name] = weight.to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale if block else scale.reshape(())

    return edit


def fp8_config(block: tuple[int, int] | None) -> Mapping[str, Any]:
    """The quantization_config of such a checkpoint."""
    found: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return found | ({"weight_block_size": list(block)} if block else {})

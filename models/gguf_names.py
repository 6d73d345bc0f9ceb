"""What llama.cpp calls an architecture of transformers, and its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Types of transformers whose architecture there has another name; all others have the same, but
# for dashes and underscores. What the gguf package does not have is refused all the same.
_RENAMED = {
    "bamba": "granitehybrid",
    "bailing_moe": "bailingmoe",
    "bailing_moe_v2": "bailingmoe2",
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "falcon_mamba": "mamba",
    "glm": "chatglm",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "iquestcoder": "llama",
    "mimo_v2_flash": "mimo2",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen2_vl": "qwen2vl",
    "qwen2_5_vl": "qwen2vl",
    "solar_open": "glm4moe",
    "youtu": "deepseek2",
}


def gguf_architecture(config: Any) -> tuple[str, int]:
    """The GGUF architecture of a configuration of transformers, and its number of blocks.

    Raises:
        ValueError: If llama.cpp has none that is known here.
    """
    import gguf

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = {_plain(name): name for name in gguf.MODEL_ARCH_NAMES.values()}
    kinds = [str(getattr(each, "model_type", "")) for each in (config, text)]
    for kind in (name for each in kinds for name in (each, each.removesuffix("_text"))):
        found = known.get(_plain(_RENAMED.get(kind, kind)))
        if found is not None:
            return found, int(text.num_hidden_layers)
    raise ValueError(
        f"llama.cpp has no architecture for models of type {kinds[-1]!r} that the gguf package "
        "names. Use another runtime (--for transformers, mlx or vllm)."
    )


def gguf_tensors(architecture: str, blocks: int, modules: Iterable[str]) -> dict[str, str]:
    """Module name -> name of its GGUF tensor, for those of the modules that have one.

    Args:
        architecture: The name that llama.cpp has for it.
        blocks: Number of blocks.
        modules: Names of modules, also inside a model of images and text.

    Raises:
        ValueError: If llama.cpp does not know the architecture.
    """
    import gguf

    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ValueError(f"llama.cpp has no architecture {architecture!r}.")
    names = gguf.get_tensor_name_map(known[architecture], blocks)
    found = {}
    for module in modules:
        for spelling in (module, module.replace("language_model.", "", 1)):
            if name := names.get_name(spelling):
                found[module] = f"{name}.weight"
                break
    return found


def check_gguf_names(config: Any, shapes: Mapping[str, tuple[int, int]], name: str) -> None:
    """Refuse a model with a planned matrix that has no place in a GGUF file.

    Args:
        config: The model's configuration; None for none of transformers.
        shapes: The matrices.
        name: The model's name.

    Raises:
        ValueError: Names the first such matrix, or the architecture.
    """
    if config is None or not hasattr(config, "model_type"):
        raise ValueError(f"{name} is no language model of transformers, so it has no GGUF form.")
    tensors = gguf_tensors(*gguf_architecture(config), shapes)
    if missing := [module for module in shapes if module not in tensors]:
        raise ValueError(
            f"llama.cpp has no tensor for {missing[0]!r} of {name} ({len(missing)} in all). Leave "
            f"them out of the plan (--exclude '{missing[0]}')."
        )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

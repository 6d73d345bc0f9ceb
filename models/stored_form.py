"""How the weights of a folder are stored: plain, decoded here, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .fp8 import METHOD

# Decoded exactly: 8-bit floats here, four-bit floats with powers of two as scales by transformers.
DECODED = (METHOD, "mxfp4")
_FILES = {  # of tools that say it beside config.json
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_PARTS = {  # tensors that only packed weights have
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "trellis": "EXL3",
    "q_weight": "EXL2",
    "absmax": "bitsandbytes",
    "quant_state.bitsandbytes__nf4": "bitsandbytes",
}


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What a folder says of how its weights are quantized, with a ``quant_method``; None if plain.

    Args:
        folder: A folder with a config.json.
    """
    config = _json(folder / "config.json")
    for section in _sections(config):
        if "bits" in section and "quant_method" not in section and "quantization" in config:
            return {"quant_method": "mlx", **section}
        return {"quant_method": _method(section), **section}
    for name, method in _FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method} | _json(folder / name)
    return None


def check_plain(folder: Path) -> None:
    """Refuse a folder whose weights are quantized in a way that is not decoded here.

    Reads names and configurations only.

    Raises:
        ValueError: Names the way, and what to give instead.
    """
    from ..quantizers.checkpoint import is_ours

    if is_ours(folder):
        original = _json(folder / "plan.json").get("model", {}).get("id")
        raise ValueError(
            f"{folder} is a packed folder that bitplan quantize wrote: its weights are quantized. "
            f"Give the original model{f', {original}' if original else ''}; "
            f"`bitplan eval {folder}` measures this one."
        )
    found = quantization_of(folder)
    if found is not None and found["quant_method"] not in DECODED:
        raise ValueError(_refusal(folder, _described(found)))
    if found is None and (tool := _packed_by(folder)):
        raise ValueError(_refusal(folder, f"packed by {tool}, which its config.json does not say"))


def _refusal(folder: Path, how: str) -> str:
    return (
        f"{folder} is quantized already ({how}): what is measured against it would be no "
        "original. Give the model it was made from; `bitplan import "
        f"{folder} --model ORIGINAL --out plan.json` reads its choice of bits where a target "
        "of bitplan exporters wrote it."
    )


def _described(found: Mapping[str, Any]) -> str:
    method = str(found["quant_method"])
    bits = found.get("bits") or found.get("w_bit")
    if method == "bitsandbytes":
        bits = 8 if found.get("load_in_8bit") else 4
    if not bits:
        groups = found.get("config_groups")
        widths = sorted(
            {
                str((group.get("weights") or {}).get("num_bits"))
                for group in (groups.values() if isinstance(groups, dict) else ())
                if isinstance(group, dict) and group.get("weights")
            }
        )
        bits = " and ".join(widths)
    form = found.get("format") or found.get("quant_algo")
    return ", ".join(filter(None, (method, str(form or ""), f"{bits} bits" if bits else "")))


def _method(section: Mapping[str, Any]) -> str:
    named = section.get("quant_method")
    if named:
        return str(named)
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in section else "a method it does not name"


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The quantization sections of a configuration and of those inside it."""
    for name in ("quantization_config", "compression_config", "quantization"):
        if isinstance(section := config.get(name), dict) and section:
            yield section
    for value in config.values():
        if isinstance(value, dict):
            yield from _sections(value)


def _packed_by(folder: Path) -> str:
    """The tool that the names of a folder's tensors speak of; empty if they are plain."""
    from .origin import tensor_files

    try:
        names = tensor_files(folder)
    except ValueError:  # damaged; whoever loads it says how
        return ""
    parts = {name.rpartition(".")[2] for name in names}
    return next((tool for part, tool in _PARTS.items() if part in parts), "")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

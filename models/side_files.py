"""Files beside a checkpoint's weights, which go along wherever it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
# How the weights were stored says nothing of the weights that are written.
_STORED = ("quantization_config", "quantization", "compression_config")
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".npz", ".pdparams", ".tflite", ".mlmodel", ".ot"),
}
_ABOUT_WEIGHTS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_OURS = ("plan.json", "README.md")  # bitplan's own; the card of the written model takes its place


def side_files(folder: Path) -> Iterator[Path]:
    """Every file of a checkpoint's folder but weights, their indices and hidden files.

    Tokenizer, chat template, processors, generation configuration, licence, code: whatever it is,
    but for links to what lies elsewhere.

    Args:
        folder: The folder.

    Yields:
        Paths relative to it, config.json not among them.
    """
    whole = folder.resolve()
    inside = (whole, whole.parent.parent / "blobs")  # the Hub's cache has links to these
    others = {sub.name for sub in folder.iterdir() if sub.is_dir() and _is_work(sub)}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if path.parts[0] in others:
            continue
        name = path.name
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
        if hidden or not file.is_file() or file.suffix in _WEIGHTS or ".index.json" in name:
            continue
        if not any(file.resolve().is_relative_to(place) for place in inside):
            continue
        if str(path) == CONFIG or name in _ABOUT_WEIGHTS or str(path) in _OURS:
            continue
        yield path


def copy_side_files(folder: Path, out: Path) -> tuple[Path, ...]:
    """Copy them into a folder, but for those it has; returns what there is now."""
    found = tuple(side_files(folder))
    for path in found:
        if not (out / path).exists():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, out / path)
    return found


def own_config(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's own config.json without how its weights were stored; None without one."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _plain(config) if isinstance(config, dict) else None


def write_config(config: Mapping[str, Any], out: Path) -> None:
    """Write a config.json, as the Hub has them."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (out / CONFIG).write_text(text + "\n", encoding="utf-8")


def missing_files(folder: Path, out: Path) -> list[str]:
    """Side files and fields of the configuration that a written folder lacks, by name."""
    missing = [str(path) for path in side_files(folder) if not (out / path).is_file()]
    before, after = own_config(folder) or {}, own_config(out) or {}
    missing += [f"{CONFIG}: {key}" for key in before if key not in after]
    return missing


def _is_work(folder: Path) -> bool:
    """Whether a folder inside holds weights or a run: another model, not a part of this one."""
    return any(
        file.suffix in _WEIGHTS or file.name in ("job.json", "plan.json")
        for file in folder.rglob("*")
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _STORED
    }

"""GPTQModel's GPTQ against ours on one matrix: same weight, same inputs, same format."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitplan.benchmarks.rivals_evaluate import DEQUANTIZED
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence

MODULE = "model.layers.10.mlp.up_proj"
SEQUENCES = 32
# GPTQModel by default reorders groups of columns (act_group_aware); without, the order is ours.
WAYS: dict[str, dict[str, Any]] = {
    "GPTQModel, columns in order, damping 0.01": {
        "act_group_aware": False,
        "desc_act": False,
        "damp_percent": 0.01,
    },
    "GPTQModel, its defaults": {},
}
FORMATS = ("int3-g64", "int4-g64")


def compared(model: LoadedModel, program: Path, tools: Path, work: Path) -> list[dict[str, Any]]:
    """Proxy losses tr(E H E^T) of one matrix, H the mean of x x^T over the same inputs.

    Args:
        model: The original model.
        program: The interpreter that has GPTQModel.
        tools: ``rivals_tools.py``.
        work: The work folder, with the calibration sequences.
    """
    calibration = work / "calibration"
    weight, inputs = taken(model, torch.load(calibration / "ids.pt")[:SEQUENCES])
    save_file({"weight": weight, "inputs": inputs}, calibration / "layer.safetensors")
    hessian = inputs.T @ inputs / len(inputs)
    return list(_rows(weight, hessian, program, tools, work))


def taken(model: LoadedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix [rows, cols] and its inputs [tokens, cols] on these sequences."""
    module: Any = model.module.get_submodule(MODULE)
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in ids.split(8):
            model.module.model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    hook.remove()
    return module.weight.detach().clone(), torch.cat(seen).contiguous()


def proxy_loss(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T), in float64.

    >>> proxy_loss(torch.tensor([[1.0, 2.0]]), torch.eye(2))
    5.0
    """
    error, hessian = error.double(), hessian.double()
    return float(((error @ hessian) * error).sum())


def _rows(
    weight: Tensor, hessian: Tensor, program: Path, tools: Path, work: Path
) -> Iterator[dict[str, Any]]:
    for name in FORMATS:
        fmt = Format.parse(name)
        mine = {
            method: proxy_loss(
                METHODS.get(method)(weight, fmt, Evidence(hessian=hessian)).dequantize() - weight,
                hessian,
            )
            for method in ("rtn", "gptq")
        }
        for way, settings in WAYS.items():
            out = work / "layer"
            asked = {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.symmetric}
            where = (work / "original", work / "calibration", out)
            words = [program, tools, "layer", *where, json.dumps(asked | settings)]
            subprocess.run(list(map(str, words)), check=True, capture_output=True, cwd=work)
            theirs = proxy_loss(load_file(out / DEQUANTIZED)["layer"] - weight, hessian)
            yield {
                "matrix": MODULE,
                "format": name,
                "against": way,
                "their loss": theirs,
                "our gptq": mine["gptq"],
                "ours / theirs": mine["gptq"] / theirs,
                "to nearest": mine["rtn"],
            }

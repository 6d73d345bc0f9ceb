"""The rivals' own programs, each run by the interpreter of its own environment.

    PYTHON rivals_tools.py TOOL ORIGINAL CALIBRATION OUT '{"bits": 3, ...}'

Needs nothing of bitplan. ORIGINAL is a folder of transformers, CALIBRATION one with ``ids.pt`` and
``texts.jsonl``; OUT becomes the quantized folder, with versions and seconds in ``made.json``. Tools
that write no packed file of these widths leave what they mean in ``dequantized.safetensors``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LAYERS = "model.layers."
SEED = 0
Settings = Mapping[str, Any]


def ids_of(calibration: Path) -> Tensor:
    """Calibration sequences [samples, length]."""
    ids: Tensor = torch.load(calibration / "ids.pt")
    return ids


def original_model(original: Path) -> tuple[Any, Any]:
    """Model, float32, and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32, device_map="cpu")
    return model.eval(), AutoTokenizer.from_pretrained(original)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(LAYERS)
    }


def save_dequantized(out: Path, weights: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """What a tool means, and in how many bytes."""
    out.mkdir(parents=True, exist_ok=True)
    plain = {name: weight.detach().float().contiguous() for name, weight in weights.items()}
    save_file(plain, out / "dequantized.safetensors")
    (out / "bytes.json").write_text(json.dumps(sizes))


def gptqmodel(original: Path, calibration: Path, out: Path, settings: Settings) -> None:
    """GPTQModel with its defaults besides the settings (``bits``, ``group_size``, ...)."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it takes 1, too few for it
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(**settings, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(original), config, dtype=torch.float32, backend=BACKEND.TORCH)
    rows = [
        {"input_ids": row, "attention_mask": [1] * len(row)} for row in ids_of(calibration).tolist()
    ]
    model.quantize(rows, batch_size=8, backend=BACKEND.TORCH)
    model.save(str(out))


def autoround(original: Path, calibration: Path, out: Path, settings: Settings) -> None:
    """AutoRound, tuned with its default number of steps."""
    from auto_round import AutoRound

    model, tokenizer = original_model(original)
    ids = ids_of(calibration)
    rounding = AutoRound(
        model,
        tokenizer=tokenizer,
        dataset=list(ids.split(8)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map="cpu",
        seed=SEED,
        **settings,
    )
    _save_autoround(rounding, out)


def _save_autoround(rounding: Any, out: Path) -> None:
    """Into the folder itself: AutoRound makes one in it that has the scheme in its name."""
    rounding.quantize_and_save(str(out), format="auto_round")
    for config in out.glob("*/config.json"):
        for file in config.parent.iterdir():
            file.rename(out / file.name)
        config.parent.rmdir()


def autoscheme(original: Path, calibration: Path, out: Path, settings: Settings) -> None:
    """AutoRound's own search for bits (``avg_bits``, ``options``), then its tuned rounding."""
    from auto_round import AutoRound, AutoScheme

    model, tokenizer = original_model(original)
    count, length = ids_of(calibration).shape
    rounding = AutoRound(
        model,
        scheme=AutoScheme(avg_bits=settings["avg_bits"], options=settings["options"]),
        tokenizer=tokenizer,
        dataset=str(calibration / "texts.jsonl"),
        nsamples=count,
        seqlen=length,
        device_map="cpu",
        seed=SEED,
    )
    _save_autoround(rounding, out)


def hqq(original: Path, calibration: Path, out: Path, settings: Settings) -> None:
    """HQQ, which takes no data; scales and zero points in float16, its default."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    model, _ = original_model(original)
    weights, sizes = {}, {}
    for name, linear in linear_layers(model).items():
        config = BaseQuantizeConfig(**settings)
        layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        stored = layer.state_dict()
        weights[name] = layer.dequantize()
        sizes[name] = sum(stored[part].nbytes for part in ("W_q", "scale", "zero"))
    save_dequantized(out, weights, sizes)


def modelopt(original: Path, calibration: Path, out: Path, settings: Settings) -> None:
    """ModelOpt's auto_quantize over weight-only integers, and its own rounding.

    It has no packed file of 2 or 3 bits: bytes are those of its codes and a float16 scale a group.
    """
    import modelopt.torch.quantization as mtq

    model, _ = original_model(original)
    planned = sum(layer.weight.numel() for layer in linear_layers(model).values())
    share = planned / sum(p.numel() for p in model.parameters() if p.dim() == 2)  # it counts all
    batches = [{"input_ids": rows, "labels": rows} for rows in ids_of(calibration).split(8)]

    def config(bits: int) -> dict[str, Any]:
        numbers = {"num_bits": bits, "block_sizes": {-1: settings["group_size"]}}
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": numbers},
            ],
            "algorithm": "max",
        }

    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": share * settings["bpw"] + (1 - share) * 16},
        quantization_formats=[config(bits) for bits in settings["bits"]],
        data_loader=batches,
        forward_step=lambda module, batch: module(**batch),
        loss_func=lambda output, batch: output.loss,
        disabled_layers=["*lm_head*", "*embed*"],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    weights, sizes = {}, {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or not name.startswith(LAYERS):
            continue
        count = module.weight.numel()
        if quantizer.is_enabled:
            weights[name] = quantizer(module.weight)
            groups = count // settings["group_size"]
            sizes[name] = count * int(quantizer.num_bits) // 8 + 2 * groups
        else:
            weights[name], sizes[name] = module.weight, 2 * count
    save_dequantized(out, weights, sizes)


def layer(original: Path, calibration: Path, out: Path, settings: Settings) -> None:
    """GPTQModel's own GPTQ on one matrix, with the inputs in CALIBRATION/layer.safetensors."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    tensors = load_file(calibration / "layer.safetensors")
    rows, cols = tensors["weight"].shape
    linear = nn.Linear(cols, rows, bias=False)
    linear.weight.data = tensors["weight"]
    task = GPTQ(linear, QuantizeConfig(**settings, device="cpu"))
    task.quantizer.configure(perchannel=True)
    for inputs in tensors["inputs"].split(1024):
        task.add_batch(inputs[None], linear(inputs)[None])
    save_dequantized(out, {"layer": task.quantize()[0]}, {"layer": 0})


TOOLS: dict[str, tuple[str, Callable[[Path, Path, Path, Settings], None]]] = {
    "gptqmodel": ("gptqmodel", gptqmodel),
    "autoround": ("auto-round", autoround),
    "autoscheme": ("auto-round", autoscheme),
    "hqq": ("hqq", hqq),
    "modelopt": ("nvidia-modelopt", modelopt),
    "layer": ("gptqmodel", layer),
}


def main(tool: str, original: str, calibration: str, out: str, settings: str) -> None:
    """Quantize, and say with what and in what time."""
    package, quantize = TOOLS[tool]
    torch.manual_seed(SEED)
    clock, cpu = time.perf_counter(), time.process_time()
    quantize(Path(original), Path(calibration), Path(out), json.loads(settings))
    made = {
        "tool": f"{package} {version(package)}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - cpu,
    }
    (Path(out) / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(*sys.argv[1:])

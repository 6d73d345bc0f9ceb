"""CPU part of the kernel benchmark: single products, a whole model, memory of loading."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitplan._base.progress import Reporter
from bitplan.benchmarks.search_lab import Part, target
from bitplan.jobs.materialize import is_packed, load_packed
from bitplan.kernels import cpu, native
from bitplan.kernels.cpu import CpuWeight
from bitplan.models.load import load_model
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor

SHAPES = ((2048, 2048), (192, 576), (576, 576), (1536, 576), (576, 1536))
SPECS = (*(f"int{bits}-g64-asym" for bits in range(1, 9)), "int4-g32-asym", "int4-g128-asym")
MODEL_WEIGHTS = 128 << 20  # as many weights in turn as a small model has: SmolLM2 has 134 million
TOKENS = 48
PROMPT = "The capital of France is"
SEARCH = (
    *("--budget", "4.3bpw", "--sequences", "16", "--eval-tokens", "2048", "--refine", "0"),
    *("--rounding", "rtn"),  # as the figures were made: codes are as fast whatever made them
)
_IMPORTS = (
    "import torch, accelerate, safetensors, bitplan;"
    "from transformers import AutoModelForCausalLM;"
    "from transformers.models.llama import modeling_llama;"
    "from bitplan.jobs import materialize;"
)
_PEAK = "print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])"

Call = Callable[[], Any]


def cpu_kernels(work: Path, reporter: Reporter) -> Part:
    """Measure everything; ``work`` keeps the packed model."""
    if native.library() is None:
        raise ValueError(f"This benchmark needs the compiled kernels. {native.unavailable()}")
    packed = packed_model(work, reporter)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with reporter.bar("Products", len(SHAPES)) as advance:
        products = []
        for shape in SHAPES:
            products += _products(shape)
            advance(1)
    rivals = _rivals()
    batches = _batches()
    torch.set_num_threads(threads)
    whole = _whole_model(packed, reporter)
    memory = _memory(packed)
    in_cache = min(row["in cache: × fp32"] for row in products)
    from_memory = min(row["from memory: × fp32"] for row in products)
    large = [r for r in products if r["shape"] == "2048 x 2048" and r["format"].startswith("int4")]
    return Part(
        tables={
            "CPU: one row of activations, one thread": products,
            "CPU: against the kernels that come with torch": rivals,
            "CPU: more rows of activations, 1536 x 576, int4-g64-asym": batches,
            "CPU: SmolLM2-135M, tokens per second": whole,
            "CPU: memory of loading": memory,
        },
        targets=[
            target("CPU, m = 1, weights in cache: slowest width, × fp32", ">= 1", in_cache),
            target("CPU, m = 1, weights from memory: slowest width, × fp32", ">= 1", from_memory),
            target(
                "CPU, m = 1, 2048 x 2048 in cache: slowest 4-bit format, × fp32",
                ">= 2.5",
                min(row["in cache: × fp32"] for row in large),
            ),
            target(
                "CPU: peak memory of loading the 4.3 bpw model, × its file",
                "<= 1.3",
                memory[0]["× file"],
            ),
        ],
        notes=[
            "CPU products: least of interleaved repetitions, float32 activations, calls from "
            "Python included. *In cache*: the same matrix again and again. *From memory*: each "
            "matrix is one of as many as make 134 million weights, visited in turn, as in the "
            "decoding of a model of that size. A call from Python costs 4 µs, which is what the "
            "192 x 576 matrices lose by when they are in the cache of the core.",
            "The errors against torch's kernels are max |y - y*| / max |y*| with y* in float64 "
            "from the dequantized weight.",
            f"SmolLM2: greedy, {TOKENS} tokens, least time per token of interleaved runs on "
            f"{threads} threads through `generate` of transformers. Memory is the peak resident "
            "size of a process minus that of one which only imports the same libraries.",
        ],
    )


def packed_model(work: Path, reporter: Reporter) -> Path:
    """The packed 4.3 bpw SmolLM2 in the work folder, made if it is not there."""
    folder = work / "packed"
    if not is_packed(folder):
        reporter.say("Making the packed model: a few minutes")
        bitplan = (sys.executable, "-m", "bitplan")
        run = str(work / "run")
        subprocess.run(
            [*bitplan, "search", "smollm2", *SEARCH, "--bootstrap", "0", "--out", run], check=True
        )
        subprocess.run([*bitplan, "quantize", f"{run}/plan.json", "--out", str(folder)], check=True)
    return folder


def _products(shape: tuple[int, int]) -> list[dict[str, Any]]:
    rows, cols = shape
    x = torch.randn(1, cols)
    plain = _copies(torch.randn(shape))
    found = []
    for spec in SPECS:
        packed = _pack(torch.randn(shape), spec)
        weights = [CpuWeight(_clone(packed)) for _ in plain]
        fused, dense = _least(_in_turn(weights[:1], plain[:1], x), 60)
        fused_all, dense_all = _least(_in_turn(weights, plain, x), 5)
        found.append(
            {
                "shape": f"{rows} x {cols}",
                "format": spec,
                "in cache: µs": 1e6 * fused,
                "fp32 µs": 1e6 * dense,
                "in cache: × fp32": dense / fused,
                "from memory: µs": 1e6 * fused_all / len(plain),
                "fp32 from memory µs": 1e6 * dense_all / len(plain),
                "from memory: × fp32": dense_all / fused_all,
            }
        )
    return found


def _in_turn(weights: Sequence[CpuWeight], plain: Sequence[Tensor], x: Tensor) -> list[Call]:
    """The products with all packed weights, and with all float32 ones."""

    def fused() -> None:
        for weight in weights:
            weight.linear(x, None)

    def dense() -> None:
        for weight in plain:
            linear(x, weight)

    return [fused, dense]


def _rivals() -> list[dict[str, Any]]:
    """Torch's int4pack and int8pack: bfloat16 activations, scales and zero points."""
    found = []
    for shape in SHAPES:
        x = torch.randn(1, shape[1])
        for spec, call_of in (("int4-g64-asym", _int4pack), ("int8-gc", _int8pack)):
            packed = _pack(torch.randn(shape), spec)
            exact = x.double() @ packed.dequantize().double().T
            ours, theirs = CpuWeight(packed), call_of(packed, x)
            fused, torch_time = _least([lambda: ours.linear(x, None), theirs], 60)  # noqa: B023
            found.append(
                {
                    "shape": f"{shape[0]} x {shape[1]}",
                    "format": spec,
                    "bitplan µs": 1e6 * fused,
                    "torch µs": 1e6 * torch_time,
                    "bitplan error": _error(ours.linear(x, None), exact),
                    "torch error": _error(theirs(), exact),
                }
            )
    return found


def _batches() -> list[dict[str, Any]]:
    packed = _pack(torch.randn(1536, 576), "int4-g64-asym")
    weight, plain = CpuWeight(packed), packed.dequantize()
    found = []
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        x = torch.randn(count, 576)
        calls: list[Call] = [lambda: weight.linear(x, None), lambda: linear(x, plain)]  # noqa: B023
        fused, dense = _least(calls, 12)
        found.append(
            {
                "rows": count,
                "way": "fused" if count <= cpu.FEW else "by tiles",
                "ms": 1e3 * fused,
                "fp32 ms": 1e3 * dense,
                "× fp32": dense / fused,
            }
        )
    return found


def _whole_model(folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
    original = load_model("smollm2", "cpu")
    half = load_model("smollm2", "cpu")
    half.module.to(torch.bfloat16)
    models = {
        "fp32 original": original,
        "bf16 original": half,
        "packed, 4.3 bpw": load_packed(folder),
    }
    tokenizer = original.workload.tokenizer
    inputs = tokenizer(PROMPT, return_tensors="pt")
    size = sum(p.numel() for p in original.module.parameters())
    sizes = [4 * size / 1e6, 2 * size / 1e6, (folder / "model.safetensors").stat().st_size / 1e6]
    best = dict.fromkeys(models, float("inf"))
    with reporter.bar("Decoding", 4 * len(models)) as advance:
        for _ in range(4):
            for name, model in models.items():
                best[name] = min(best[name], _decode(model, inputs))
                advance(1)
    return [
        {
            "model": name,
            "MB": mb,
            "tokens/s": 1 / best[name],
            "× fp32": best["fp32 original"] / best[name],
        }
        for name, mb in zip(models, sizes, strict=True)
    ]


def _decode(model: LoadedModel, inputs: Any) -> float:
    """Least seconds per token of two parts of a text, without reading the prompt."""
    times: list[float] = []

    class Clock:
        def put(self, _: Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    model.module.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        streamer=Clock(),
    )
    middle = len(times) // 2
    halves = (times[2 : middle + 1], times[middle:])
    return min((half[-1] - half[0]) / (len(half) - 1) for half in halves)


def _memory(folder: Path) -> list[dict[str, Any]]:
    file = (folder / "model.safetensors").stat().st_size
    load = f"m = bitplan.load({str(folder)!r});"
    first = "torch.set_grad_enabled(False); m(torch.arange(4)[None]);"
    nothing = _peak("")
    peaks = {"loading": _peak(load), "loading and first tokens": _peak(load + first)}
    return [
        {
            "what": what,
            "peak MB": (peak - nothing) / 1e6,
            "file MB": file / 1e6,
            "× file": (peak - nothing) / file,
        }
        for what, peak in peaks.items()
    ]


def _peak(code: str) -> int:
    """Peak resident bytes of a process that imports everything and runs ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS + code + _PEAK], capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout)


def _int4pack(packed: PackedTensor, x: Tensor) -> Call:
    grid = packed.grid()
    assert grid is not None and grid.zero is not None
    scale, cols = grid.scale.float(), packed.shape[1]
    size = packed.fmt.group_size
    codes = packed.dequantize().view(*scale.shape, size) / scale[..., None] + grid.zero[..., None]
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        codes.round().int().view(-1, cols), 1
    )
    middle = (8 - grid.zero.float()) * scale
    grids = torch.stack([scale, middle], -1).transpose(0, 1).contiguous().bfloat16()
    half = x.bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, words, size, grids)


def _int8pack(packed: PackedTensor, x: Tensor) -> Call:
    scale = packed.tensors["scale"][:, 0].bfloat16()
    codes = (packed.tensors["codes"].int() - 128).to(torch.int8)
    half = x.bfloat16()
    return lambda: torch.ops.aten._weight_int8pack_mm(half, codes, scale)


def _pack(weight: Tensor, spec: str) -> PackedTensor:
    fmt = Format.parse(spec)
    return METHODS.get("rtn")(weight, fmt, Evidence())


def _clone(packed: PackedTensor) -> PackedTensor:
    parts = {name: part.clone() for name, part in packed.tensors.items()}
    return PackedTensor(packed.fmt, packed.shape, parts)


def _copies(weight: Tensor) -> list[Tensor]:
    return [weight.clone() for _ in range(MODEL_WEIGHTS // weight.numel())]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def _least(calls: Sequence[Call], rounds: int) -> list[float]:
    """The least seconds of every call, taken in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            started = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - started)
    return best

"""Choosing how ``plane_gemm`` is launched: by a rule, or by what was measured on the device.

Triton's own autotuner measures in the first call of a shape, inside whatever runs then (a CUDA
graph capture, a compiled model), and cannot choose the number of splits, which decides how much
memory a launch needs.  So tuning is a step of its own: :func:`tune` prunes the candidates with a
latency model, measures the rest, and keeps the best in a file per device; :func:`choose_launch`
only looks it up.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .._base.files import write_json
from .._base.native import cache_folder
from .packing import PlanePack
from .triton_launch import Extras, Launch, multiply, natural_warps

# Predicted seconds of a launch, from arguments of ``plane_gemm`` by name: words, scales, zeros, M,
# N, x_stride, splits, ROWS, COLS, TOKENS, STAGES and num_warps.
PerfModel = Callable[..., float]
Measure = Callable[[Callable[[], Tensor]], float]  # seconds of a call

MOST_TOKENS = 64  # of a program
_PROGRAMS_PER_PROCESSOR = 4
_LEAST_CELLS = 4  # of a split: below, filling the pipeline takes longer than the work


def choose_launch(x: Tensor, pack: PlanePack) -> Launch:
    """How to multiply ``x`` [M, K] by a pack: as tuned on this device, else by rule."""
    device = x.device.index or 0 if x.device.type == "cuda" else -1
    key = _key(pack, len(x), x.dtype)
    return _tuned(device).get(key) or rule(pack, len(x), processors(device))


def rule(pack: PlanePack, tokens: int, count: int) -> Launch:
    """A launch that occupies so many processors with programs of four cells or more."""
    block = max(_least_tokens(pack), min(32, _power_of_two(tokens)))
    programs = pack.table.shape[0] * math.ceil(tokens / block)
    wanted = math.ceil(_PROGRAMS_PER_PROCESSOR * count / programs)
    splits = max(1, min(wanted, _cells_per_row_block(pack) // _LEAST_CELLS))
    return Launch(block, natural_warps(pack), _stages(pack), splits)


def candidates(pack: PlanePack, tokens: int) -> list[Launch]:
    """All launches worth a thought."""
    least, natural = _least_tokens(pack), natural_warps(pack)
    most = max(least, min(MOST_TOKENS, _power_of_two(tokens)))
    blocks = [b for b in (8, 16, 32, 64) if least <= b <= most]
    # The words of the largest cell also suit four warps of NVIDIA's.
    warps = [2, 4] if pack.cell.words == 512 and pack.order == "nvidia" else [natural]
    splits = [s for s in (1, 2, 3, 4, 6, 8, 12, 16) if s <= _cells_per_row_block(pack)]
    return [
        Launch(*choice)
        for choice in itertools.product(blocks, warps, (1, 2, 3), splits)
        if choice[0] < 64 or choice[1] == 4  # two warps have no registers for 64 tokens
    ]


def prune(
    pack: PlanePack, tokens: int, launches: Sequence[Launch], model: PerfModel, count: int
) -> list[Launch]:
    """The ``count`` launches that a model predicts to be fastest, fastest first."""

    def predicted(launch: Launch) -> float:
        return model(
            words=pack.words,
            scales=pack.scales,
            zeros=pack.zeros,
            M=tokens,
            N=pack.shape[0],
            x_stride=pack.shape[1],
            splits=launch.splits,
            ROWS=pack.cell.rows,
            COLS=pack.cell.cols,
            TOKENS=launch.tokens,
            STAGES=launch.stages,
            num_warps=launch.warps,
        )

    return sorted(launches, key=predicted)[:count]


def tune(
    x: Tensor, pack: PlanePack, model: PerfModel, *, top: int = 8, measure: Measure | None = None
) -> tuple[Launch, float]:
    """Measure the launches that a model predicts to be fastest, and remember the best.

    Args:
        x: Inputs [M, K] on the device of the pack.
        pack: The weight.
        model: Predicts the seconds of a launch.
        top: Launches to measure, besides the one by rule.
        measure: Seconds of a call; by default Triton's benchmark on the GPU.

    Returns:
        The best launch and its seconds.

    Raises:
        ValueError: If there is no GPU to measure on.
    """
    if measure is None:
        if x.device.type != "cuda":
            raise ValueError("Tuning measures on a GPU, but the input is on the CPU.")
        measure = _on_gpu
    device = x.device.index or 0 if x.device.type == "cuda" else -1
    chosen = prune(pack, len(x), candidates(pack, len(x)), model, top)
    chosen.append(rule(pack, len(x), processors(device)))
    timed = {
        launch: measure(functools.partial(multiply, x, pack, None, Extras(), launch))
        for launch in dict.fromkeys(chosen)
    }
    best = min(timed, key=lambda launch: timed[launch])
    path = cache_file(device)
    stored = _read(path) | {_key(pack, len(x), x.dtype): best}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"launches": {key: list(launch) for key, launch in stored.items()}})
    _tuned.cache_clear()
    return best, timed[best]


def cache_file(device: int) -> Path:
    """Where the tuned launches of a device are kept; -1 is the interpreter."""
    name = torch.cuda.get_device_name(device) if device >= 0 else "interpreter"
    return cache_folder() / f"launches-{re.sub('[^A-Za-z0-9]+', '-', name)}.json"


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of a device; 1 for the interpreter."""
    if device < 0:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _tuned(device: int) -> dict[str, Launch]:
    return _read(cache_file(device))


def _read(path: Path) -> dict[str, Launch]:
    """The launches in a file; none if it is missing or was made by another version."""
    try:
        stored = json.loads(path.read_text())["launches"]
        return {key: Launch(*map(int, launch)) for key, launch in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _key(pack: PlanePack, tokens: int, dtype: torch.dtype) -> str:
    """What a tuned launch is for: shape, layout, mix of widths, power of two of tokens."""
    kinds = "+".join(f"{kind.bits}g{kind.group}{kind.zero}" for kind in pack.classes)
    return (
        f"{pack.shape[0]}x{pack.shape[1]} {pack.cell.rows}x{pack.cell.cols} {pack.order} "
        f"{kinds} {pack.words.numel()} t{_power_of_two(tokens)} {dtype}"
    )


def _power_of_two(tokens: int) -> int:
    return int(2 ** math.ceil(math.log2(max(1, tokens))))


def _least_tokens(pack: PlanePack) -> int:
    return 16 if pack.order == "amd" else 8


def _stages(pack: PlanePack) -> int:
    return 1 if pack.order == "amd" else 2


def _cells_per_row_block(pack: PlanePack) -> int:
    return -(-pack.shape[1] // pack.cell.cols)


def _on_gpu(call: Callable[[], Tensor]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median")) / 1000

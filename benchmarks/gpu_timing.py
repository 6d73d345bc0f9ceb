"""Timings of products on a device: copies, few vectors at a time, many, and ways to launch."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitplan.benchmarks.gpu_cases import MIXES, WIDTHS, Weight, build, copied, uniform
from bitplan.kernels.gemm import plane_linear
from bitplan.kernels.packing import PlanePack
from bitplan.kernels.triton_launch import Extras, Launch, multiply
from bitplan.kernels.tune import rule

Call = Callable[[], Any]
Row = dict[str, Any]

ROUNDS = 5
MOST_COPIES = 128
CACHES = 5  # weights that take turns fill the cache so many times
MATRICES = ((4096, 4096), (4096, 14336), (8192, 8192))
DECODE = (1, 4, 16, 64)
PREFILL = (512, 2048)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call.

    Attributes:
        plain: Called from Python one after the other.
        graph: In a CUDA graph that is replayed; as ``plain`` where there is no GPU.
    """

    plain: float
    graph: float


def time_calls(calls: Sequence[Call], device: torch.device, seconds: float = 0.03) -> Timing:
    """Medians over some rounds of all calls, each on data of its own, after a warm-up."""
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        once = time.perf_counter() - start
        return Timing(once, once)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
        calls[-1]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    def one_by_one() -> None:
        for call in calls:
            call()

    plain = _median(one_by_one, seconds / 3) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_by_one()
    replayed = _median(graph.replay, seconds) / len(calls)
    graph.reset()
    return Timing(plain, replayed)


def _median(run: Call, seconds: float) -> float:
    """Seconds of a run on the current stream; the median of at least some rounds."""
    run()
    found: list[float] = []
    torch.cuda.synchronize()
    start = time.perf_counter()
    while len(found) < ROUNDS or time.perf_counter() - start < seconds:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1000)
    return statistics.median(found)


def copy_bandwidth(device: torch.device, size: int) -> Row:
    """Bytes per second of a copy within the device's memory, read and written ones together."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_calls([lambda: target.copy_(source)], device, 0.3).plain
    return {"bytes": 2 * size, "seconds": seconds, "bytes_per_s": 2 * size / seconds}


def copies_of(size: int, cache: int) -> int:
    """How many weights of a size take turns."""
    return min(max(math.ceil(CACHES * cache / size), 2), MOST_COPIES)


def inputs(tokens: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers [tokens, cols]."""
    generator = torch.Generator(device).manual_seed(tokens)
    return torch.randn(tokens, cols, device=device, generator=generator).to(dtype)


@dataclass(frozen=True, slots=True)
class Rival:
    """Products of 16-bit weights that are not ours, or of ours: copies that take turns."""

    name: str
    bits: float
    weight_bytes: int
    products: Sequence[Callable[[Tensor], Tensor]]


def dense_rival(shape: tuple[int, int], device: torch.device, cache: int) -> Rival:
    """torch's own product in bfloat16."""
    size = 2 * shape[0] * shape[1]
    weights = [
        torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
        for _ in range(copies_of(size, cache))
    ]
    return Rival("torch bf16", 16, size, [partial(linear, weight=w) for w in weights])


def int4_rival(shape: tuple[int, int], device: torch.device, cache: int) -> Rival:
    """torch's int4 product with groups of 128: what torchao calls for few vectors.

    Raises:
        RuntimeError: If this build of torch has none for the device.
    """
    rows, cols = shape
    size = rows * cols // 2 + 4 * rows * cols // 128
    products = []
    for _ in range(copies_of(size, cache)):
        codes = torch.randint(256, (rows, cols // 2), dtype=torch.uint8, device=device)
        packed = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(cols // 128, rows, 2, device=device, dtype=torch.bfloat16) / 256
        products.append(partial(_int4_product, packed=packed, scales=scales))
    return Rival("torch int4 (tinygemm)", 4, size, products)


def _int4_product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch._weight_int4pack_mm(x, packed, 128, scales)


def torchao_rival(shape: tuple[int, int], device: torch.device, cache: int) -> Rival:
    """The int4 weights of torchao, as its users get them.

    Raises:
        ImportError: If it is not installed.
    """
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    size = shape[0] * shape[1] // 2 + 4 * shape[0] * shape[1] // 128
    layers = []
    for _ in range(copies_of(size, cache)):
        layer = torch.nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
        quantize_(layer, Int4WeightOnlyConfig(group_size=128))
        layers.append(layer)
    return Rival("torchao int4", 4, size, layers)


def packed_rival(
    weight: Weight, shape: tuple[int, int], device: torch.device, cache: int, seed: int
) -> Rival:
    """Our own product."""
    pack = build(weight, shape, device, seed, dense=False).pack
    packs = [pack, *(copied(pack) for _ in range(copies_of(pack.nbytes, cache) - 1))]
    products = [partial(_packed_product, pack=some) for some in packs]
    return Rival(weight.name, weight.bits, pack.nbytes, products)


def _packed_product(x: Tensor, pack: PlanePack) -> Tensor:
    return plane_linear(x, pack)


def rivals(
    shape: tuple[int, int],
    device: torch.device,
    cache: int,
    seed: int,
    note: Callable[[str], None],
    short: bool = False,
) -> Iterator[Rival]:
    """All contenders for a matrix, torch's bf16 first; those that are not there are noted."""
    yield dense_rival(shape, device, cache)
    if device.type == "cuda":
        for make in (int4_rival, torchao_rival):
            try:
                yield make(shape, device, cache)
            except Exception as error:
                note(f"{make.__name__}: {type(error).__name__}: {error}"[:300])
    for weight in (uniform(3), MIXES[1]) if short else (*map(uniform, WIDTHS), *MIXES):
        yield packed_rival(weight, shape, device, cache, seed)


def race(
    shape: tuple[int, int],
    tokens: Sequence[int],
    contenders: Iterator[Rival],
    device: torch.device,
    bandwidth: float,
    dtype: torch.dtype = torch.bfloat16,
    most: int = MOST_COPIES,
) -> Iterator[Row]:
    """Time contenders, the first of which is what speed-ups are over.

    Args:
        shape: Of the matrix, outputs and inputs.
        tokens: Numbers of vectors.
        contenders: Who takes part.
        device: Where.
        bandwidth: Bytes per second of a copy.
        dtype: Of the activations.
        most: Copies of a weight that take part, at most.
    """
    rows, cols = shape
    base: dict[int, Timing] = {}
    for rival in contenders:
        ours = dtype if base or rival.name != "torch bf16" else torch.bfloat16
        for m in tokens:
            x = inputs(m, cols, ours, device)
            some = rival.products[:most]
            timing = time_calls([partial(product, x) for product in some], device)
            base.setdefault(m, timing)
            moved = rival.weight_bytes + 2 * m * (rows + cols)
            yield {
                "kernel": rival.name,
                "bits": rival.bits,
                "n": rows,
                "k": cols,
                "m": m,
                "activations": str(ours).removeprefix("torch."),
                "us": 1e6 * timing.graph,
                "plain_us": 1e6 * timing.plain,
                "speedup": base[m].graph / timing.graph,
                "weight_bytes": rival.weight_bytes,
                "of_memory_bound": moved / bandwidth / timing.graph,
                "tflops": 2e-12 * m * rows * cols / timing.graph,
            }


def sweep_of(tokens: int, splits: Sequence[int] = (1, 2, 4, 8, 16)) -> list[Launch]:
    """Ways to launch a product with whole cells on NVIDIA's processors."""
    block = max(8, min(32, 1 << (tokens - 1).bit_length()))
    return [Launch(block, *way) for way in itertools.product((2, 4), (1, 2, 3), splits)]


def sweep_launches(
    weight: Weight,
    shape: tuple[int, int],
    tokens: int,
    device: torch.device,
    cache: int,
    processors: int,
) -> Iterator[Row]:
    """Time ways to launch, and the one by rule, first."""
    pack = build(weight, shape, device, 0, dense=False).pack
    packs = [pack, *(copied(pack) for _ in range(copies_of(pack.nbytes, cache) - 1))]
    x = inputs(tokens, shape[1], torch.bfloat16, device)
    ruled = rule(pack, tokens, processors)
    ways = sweep_of(tokens) if device.type == "cuda" else []
    for launch in dict.fromkeys([ruled, *ways]):
        calls = [partial(multiply, x, some, None, Extras(), launch) for some in packs]
        timing = time_calls(calls, device)
        yield {
            "kernel": weight.name,
            "n": shape[0],
            "k": shape[1],
            "m": tokens,
            "launch": list(launch),
            "by_rule": launch == ruled,
            "us": 1e6 * timing.graph,
        }

"""Time of packed products on the machine at hand, against float32 ones, and a device made of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as pairs
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...quantizers.format import Format
from ...quantizers.packed import PackedTensor
from ..gemm import order_of
from ..latency import DENSE, WIDTHS, Device, Number
from ..layouts import prepare
from ..packing import PlanePack
from .fitting import Freedom, Timings, fit, timings_of
from .launch_cost import perf_model

FLOAT_BITS = 16  # a matrix that a plan leaves as it is
ROTATED_BYTES = 64 << 20  # weights that take turns, so that none is found in a cache
MOST_COPIES = 64
LEAST_ROUNDS = 5
_SLOWEST = 50.0  # the most that an efficiency may become where a device's maker says nothing


class Shape(NamedTuple):
    """A product of ``m`` vectors with a matrix of ``n`` outputs and ``k`` inputs."""

    m: int
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Row:
    """One timing.

    Attributes:
        bits: Bits per code; 16 for a 16-bit float matrix, 32 for the float32 product itself.
        m: Vectors at a time.
        n: Output features.
        k: Input features.
        seconds: The fastest of many calls.
        speedup_vs_fp32: Seconds of the float32 product over these.
        weight_bytes: Bytes of the matrix.
    """

    bits: int
    m: int
    n: int
    k: int
    seconds: float
    speedup_vs_fp32: float
    weight_bytes: int


def bench(
    shapes: Sequence[Shape],
    bits: Sequence[int],
    device: torch.device,
    *,
    group_size: int = 128,
    seconds: float = 0.5,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Time the packed product of every width, and float32, for every shape.

    The compared products take turns call by call, each on the next of several copies of its
    weights, and the fastest call of each counts: that survives other load on the machine.  On a
    GPU a graph of all copies is replayed instead, so that the time of launching from Python is not
    measured.

    Args:
        shapes: The products.
        bits: Widths from 1 to 8, and 16 for a 16-bit float.
        device: ``cpu`` or ``cuda``.
        group_size: Weights per scale and zero point.
        seconds: Time to spend on each product of each shape.
        advance: Called with 1 after every shape.

    Raises:
        ValueError: If a width or shape cannot be.
    """
    check(shapes, bits)
    rows = []
    for shape in shapes:
        contenders = {width: _Contender.packed(width, shape, device, group_size) for width in bits}
        contenders[32] = _Contender.plain(shape, device)
        fastest = _race(list(contenders.values()), seconds, device)
        for (width, contender), best in zip(contenders.items(), fastest, strict=True):
            rows.append(Row(width, *shape, best, fastest[-1] / best, contender.weight_bytes))
        advance(1)
    return rows


def tune(
    shapes: Sequence[Shape],
    bits: Sequence[int],
    device: torch.device,
    base: Device,
    group_size: int = 128,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Choose launches by measurement, among those that a latency model predicts to be fast.

    What is chosen is kept for every later run on this device.

    Args:
        shapes: The products.
        bits: Widths.
        device: A GPU.
        base: What is known of it.
        group_size: Weights per scale and zero point.
        advance: Called with 1 after every shape.

    Raises:
        ValueError: If there is no GPU.
    """
    if device.type != "cuda":
        raise ValueError("Only launches on a GPU are tuned. Leave out --tune.")
    from .. import tune as tuning  # needs Triton

    for shape in shapes:
        for width in filter(WIDTHS.__contains__, bits):
            weight = _random_weight(_format(width, group_size, device), (shape.n, shape.k), 0)
            pack = PlanePack.from_packed(weight, order_of(device)).to(device)
            tuning.tune(_input(shape, device), pack, perf_model(base))
        advance(1)


def check(shapes: Sequence[Shape], bits: Sequence[int]) -> None:
    """Raise if a width or shape cannot be.

    Raises:
        ValueError: Naming the first that cannot.
    """
    for shape in shapes:
        if min(shape) < 1:
            raise ValueError(f"A product of m, n, k = {tuple(shape)}: all must be at least 1.")
    odd = [width for width in bits if width not in WIDTHS and width != FLOAT_BITS]
    if odd or not bits:
        raise ValueError(
            f"Widths are 1 to 8, and 16 for bf16; {odd[0] if odd else 'none'} was given."
        )


@dataclass(frozen=True, slots=True)
class _Contender:
    """A product with copies of its weights, and its input [m, k]."""

    products: Sequence[Callable[[Tensor], Tensor]]
    x: Tensor
    weight_bytes: int

    @staticmethod
    def packed(bits: int, shape: Shape, device: torch.device, group_size: int) -> _Contender:
        fmt = _format(bits, group_size, device)
        size = fmt.stored_bytes((shape.n, shape.k))
        x = _input(shape, device)
        weights = (_random_weight(fmt, (shape.n, shape.k), seed) for seed in range(_copies(size)))
        layouts = [prepare(weight, device) for weight in weights]
        products = [partial(layout.linear, bias=None) for layout in layouts]
        return _Contender(products, x, size)

    @staticmethod
    def plain(shape: Shape, device: torch.device) -> _Contender:
        size = 4 * shape.n * shape.k
        products = [
            nn.Linear(shape.k, shape.n, bias=False, device=device) for _ in range(_copies(size))
        ]
        return _Contender(products, _input(shape, device).float(), size)


def _format(bits: int, group_size: int, device: torch.device) -> Format:
    plain = "bf16" if device.type == "cpu" else "fp16"  # that of the activations on a GPU
    return Format.parse(plain if bits == FLOAT_BITS else f"int{bits}-g{group_size}-asym")


def _input(shape: Shape, device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape.m, shape.k, generator=generator).to(device, dtype)


def _copies(size: int) -> int:
    return min(max(math.ceil(ROTATED_BYTES / size), 2), MOST_COPIES)


def _random_weight(fmt: Format, shape: tuple[int, int], seed: int) -> PackedTensor:
    """A weight of random codes with scales that make outputs of a common size."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, (size, dtype) in fmt.tensors(shape).items():
        if dtype == "uint8":
            parts[name] = torch.randint(256, size, generator=generator, dtype=torch.uint8)
        else:
            scale = 0.02 / 2 ** min(fmt.bits, 8)
            parts[name] = (scale * torch.rand(size, generator=generator)).to(getattr(torch, dtype))
    return PackedTensor(fmt, shape, parts)


@torch.inference_mode()
def _race(contenders: Sequence[_Contender], seconds: float, device: torch.device) -> list[float]:
    """Seconds of the fastest call of each."""
    if device.type == "cuda":
        return [_graph_seconds(contender, seconds) for contender in contenders]
    for contender in contenders:  # what is compiled or laid out at the first call is not timed
        for product in contender.products:
            product(contender.x)
    fastest = [math.inf] * len(contenders)
    start, done = time.perf_counter(), 0
    while done < LEAST_ROUNDS or time.perf_counter() - start < seconds * len(contenders):
        for i, contender in enumerate(contenders):
            product = contender.products[done % len(contender.products)]
            before = time.perf_counter()
            product(contender.x)
            fastest[i] = min(fastest[i], time.perf_counter() - before)
        done += 1
    return fastest


def _graph_seconds(contender: _Contender, seconds: float) -> float:
    """Seconds of one call, from replays of a CUDA graph with a call of every copy."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for product in contender.products:
            product(contender.x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in contender.products:
            product(contender.x)
    fastest, done, start = math.inf, 0, time.perf_counter()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while done < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        fastest = min(fastest, first.elapsed_time(last) / 1000)
        done += 1
    return fastest / len(contender.products)


def refit(base: Device, rows: Iterable[Row], name: str, source: str) -> Device:
    """The device with what timings show: its launch, and what kernels make of it.

    On a GPU the decode cost of all widths moves together: its ratios are counted.  On a CPU
    every width has code of its own, so each has its own cost.

    Args:
        base: The device as it was.
        rows: The timings.
        name: The result's name.
        source: What was timed, and where.

    Raises:
        ValueError: If there are too few timings.
    """
    rows = list(rows)
    packed = [row for row in rows if row.bits in WIDTHS]
    floats = [row for row in rows if row.bits == FLOAT_BITS]
    floats = floats or [row for row in rows if row.bits not in WIDTHS]
    widths = tuple(sorted({row.bits for row in packed}))
    decode = tuple((b,) for b in widths) if base.family == "cpu" else (widths,)
    freedom = Freedom(decode, most=_SLOWEST if base.family == "cpu" else 1.3)
    found = fit(base, base.default, _timings(packed), freedom, source, t0=base.launch.value)
    kernel = found.kernel
    assert kernel.instructions is not None
    measured = {b: kernel.instructions.value[b] for b in widths}
    only = kernel.instructions.model_copy(update={"value": measured})
    kernels = base.kernels | {base.default: kernel.model_copy(update={"instructions": only})}
    if floats:
        dense = fit(base, DENSE, _timings(floats), Freedom((), freedom.most), source, found.t0)
        start = _seconds(dense.t0, source)
        kernels[DENSE] = dense.kernel.model_copy(update={"launch": start})
    launch = _seconds(found.t0, source)
    return base.model_copy(update={"name": name, "kernels": kernels, "launch": launch})


def _seconds(value: float, source: str) -> Number:
    return Number(value=float(f"{value:.4g}"), basis="fitted", source=source)


def errors_of(device: Device, rows: Sequence[Row]) -> list[float]:
    """How far the device's predictions are from timings: 0.05 is five percent too slow."""
    errors = []
    for row in rows:
        name = f"int{row.bits}-gc" if row.bits in WIDTHS else "bf16"
        predicted = device.seconds(
            Format.parse(name), (row.n, row.k), row.m, weight_bytes=row.weight_bytes
        )
        errors.append(predicted / row.seconds - 1)
    return errors


def _timings(rows: Sequence[Row]) -> Timings:
    return timings_of([(r.bits, r.n, r.k, r.m, r.weight_bytes, r.seconds) for r in rows])


def grid(m: Iterable[int], n_k: Iterable[tuple[int, int]]) -> list[Shape]:
    """Every number of vectors with every matrix."""
    return [Shape(tokens, *matrix) for matrix, tokens in pairs(n_k, m)]

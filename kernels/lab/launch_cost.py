"""What a launch of a packed product costs, to choose among launches before any is compiled.

The latency model with three things that depend on how a product is cut into programs: processors
that wait for the last program, memory that waits for requests, and partial sums that are written
and read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..latency import NORM, WIDTHS, Device, Kernel

MEMORY_LATENCY = 7e-7  # seconds until a request to the memory is answered; assumed for all GPUs
PROGRAMS_AT_ONCE = 8  # of two warps on one processor; registers allow about ten
_SUM_BYTES = 4


class Cut(NamedTuple):
    """How a product is cut into programs.

    Attributes:
        rows: Output features of a program.
        tokens: Vectors of a program.
        splits: Parts of the input features.
        warps: Warps of a program.
        in_flight: Bytes of weights that a program has asked for at any time.
    """

    rows: int
    tokens: int
    splits: int
    warps: int
    in_flight: int


def launch_seconds(
    device: Device,
    rows: int,
    cols: int,
    tokens: int,
    weight_bytes: int,
    instructions: float,
    cut: Cut,
) -> float:
    """Predicted seconds of one product, cut in some way.

    Args:
        device: The device; its default kernel runs.
        rows: Output features.
        cols: Input features.
        tokens: Vectors.
        weight_bytes: Bytes of the matrix.
        instructions: Thread instructions per weight, averaged over the matrix.
        cut: The programs.
    """
    kernel = device.kernels[device.default]
    times_read = math.ceil(tokens / cut.tokens)
    programs = math.ceil(rows / cut.rows) * cut.splits * times_read
    waves = math.ceil(programs / device.processors)
    busy = programs / (waves * device.processors)  # processors that have work, on average
    at_once = min(programs, device.processors * max(1, PROGRAMS_AT_ONCE * 2 // cut.warps))
    asked = at_once * cut.in_flight / (device.bandwidth.value * MEMORY_LATENCY)
    partial = 2 * cut.splits * _SUM_BYTES * tokens * rows if cut.splits > 1 else 0
    moved = weight_bytes + partial + 2 * tokens * (rows + cols)
    weights = rows * cols * times_read
    parts = (
        moved / (kernel.eta_bandwidth.value * device.bandwidth.value * min(1.0, asked)),
        weights * instructions / (kernel.eta_issue.value * device.issue_rate.value * busy),
        2 * weights * cut.tokens / (kernel.eta_peak.value * device.peak.value * busy),
    )
    launches = 2 if cut.splits > 1 else 1
    launch = (kernel.launch or device.launch).value
    return float(launches * launch + sum(part**NORM for part in parts) ** (1 / NORM))


def average_instructions(kernel: Kernel, bits: float) -> float:
    """Instructions per weight of codes of so many bits on average, between those of two widths."""
    known = {} if kernel.instructions is None else kernel.instructions.value
    widths = sorted(known)
    if not widths:
        return 0.0
    return float(np.interp(bits, widths, [known[width] for width in widths]))


def perf_model(device: Device) -> Callable[..., float]:
    """What ``triton.autotune`` calls as ``prune_configs_by["perf_model"]`` of ``plane_gemm``.

    Args:
        device: The device that is tuned for.

    Returns:
        A function of the kernel's arguments and a configuration's, by name: predicted seconds.
    """
    kernel = device.kernels[device.default]

    def predicted(
        *,
        words: Any,
        scales: Any,
        zeros: Any,
        M: int,
        N: int,
        x_stride: int,
        splits: int,
        ROWS: int,
        COLS: int,
        TOKENS: int,
        STAGES: int,
        num_warps: int,
        **_: Any,
    ) -> float:
        cols = math.ceil(x_stride / COLS) * COLS  # inputs are padded to whole cells
        bits = min(8 * words.nbytes / (math.ceil(N / ROWS) * ROWS * cols), WIDTHS[-1])
        cut = Cut(ROWS, TOKENS, splits, num_warps, int(STAGES * ROWS * COLS * bits / 8))
        size = words.nbytes + scales.nbytes + zeros.nbytes
        return launch_seconds(device, N, cols, M, size, average_instructions(kernel, bits), cut)

    return predicted

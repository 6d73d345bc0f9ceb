"""The latency model against published timings: what a fit reaches, and how far it carries.

Needs ``BITPLAN_DATA/latency/gemm_points.json``: rows of device, kernel, bits per weight, tokens and
seconds, for one product with an 8192 x 8192 matrix, 16-bit activations and scales per channel, from
the benchmark tables of the Humming repository.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitplan._base.progress import Reporter
from bitplan.benchmarks.common import RESULTS
from bitplan.benchmarks.search_lab import Part, Row, target
from bitplan.kernels.lab.fitting import (
    NO_DECODE,
    SIMPLE_WIDTHS,
    TWO_CLASSES,
    Fit,
    Freedom,
    Timings,
    fit,
    relative_errors,
    timings_of,
    without_each_width,
)
from bitplan.kernels.latency import DENSE, WIDTHS, Device, Kernel, Number, Widths
from bitplan.quantizers.format import Format

DATA = Path(os.environ.get("BITPLAN_DATA", RESULTS.parents[2] / "shared" / "data"))
SIDE = 8192
DEVICES = ("rtx4090", "a800", "h20", "h200")
DECODE = 16  # the most tokens that count as decoding
MOST = 1.1  # efficiency: clocks go a little above what is published
SOURCE = (
    "timings in the Humming repository: 8192 x 8192, 16-bit activations, scales per channel, 1 to "
    "16384 tokens"
)
START = {b: 2.0 if b in SIMPLE_WIDTHS else 2.5 for b in WIDTHS}  # instructions per weight
KERNELS: dict[str, tuple[str, str, Freedom]] = {  # by name in the data: ours, in words, freedom
    "humming": ("humming", "Humming", TWO_CLASSES),
    "marlin": ("marlin", "Marlin", Freedom(((4, 8),))),
    "torch": (DENSE, "16-bit product of torch (cuBLAS)", NO_DECODE),
}


def read_points(path: Path) -> dict[tuple[str, str], Timings]:
    """The published timings by device and kernel."""
    rows: dict[tuple[str, str], list[tuple[int, int, int, int, float, float]]] = {}
    for device, kernel, bits, tokens, seconds in json.loads(path.read_text(encoding="utf-8")):
        fmt = Format.parse(f"int{bits}-gc" if bits in WIDTHS else "fp16")
        size = float(fmt.stored_bytes((SIDE, SIDE)))
        key = device.lower(), kernel
        rows.setdefault(key, []).append((bits, SIDE, SIDE, tokens, size, seconds))
    return {key: timings_of(some) for key, some in rows.items()}


def blank(device: Device, name: str, decode: bool = True) -> Device:
    """The device with a kernel that nothing is known of."""
    _, words, freedom = KERNELS[name]
    guess = Number(value=0.8, basis="assumed", source="before the fit")
    whole = Number(value=1.0, basis="assumed", source="fitted as part of the instructions")
    widths = {b: START[b] for group in freedom.decode for b in group}
    kernel = Kernel(
        description=words,
        eta_bandwidth=guess,
        eta_issue=whole,
        eta_peak=guess,
        instructions=Widths(value=widths, basis="assumed", source="before the fit")
        if widths and decode
        else None,
    )
    return device.model_copy(update={"kernels": device.kernels | {KERNELS[name][0]: kernel}})


def fitted(device: Device, name: str, timings: Timings) -> Fit:
    """A kernel as fitted to published timings."""
    ours, _, freedom = KERNELS[name]
    return fit(blank(device, name), ours, timings, freedom._replace(most=MOST), SOURCE)


def left_out(device: Device, timings: Timings, decode: bool = True) -> NDArray[np.float64]:
    """Relative errors of Humming while decoding, each width fitted without its own timings."""
    freedom = (TWO_CLASSES if decode else NO_DECODE)._replace(most=MOST if decode else 1.3)
    start = blank(device, "humming", decode)
    errors = without_each_width(start, "humming", timings, freedom, DECODE)
    return np.concatenate(list(errors.values()))


def latency_model(_work: Path, _reporter: Reporter) -> Part:
    """Fit every kernel to its published timings, and Humming again without each of its widths.

    Raises:
        ValueError: If the timings are not there.
    """
    path = DATA / "latency" / "gemm_points.json"
    if not path.is_file():
        raise ValueError(f"No timings at {path}. Set BITPLAN_DATA to the folder above latency/.")
    points = read_points(path)
    fits, outs, targets = [], [], []
    for name in DEVICES:
        device = Device.load(name)
        for kernel in KERNELS:
            fits.append(_fit_row(device, kernel, points[name, kernel]))
        timings = points[name, "humming"]
        errors, plain = np.abs(left_out(device, timings)), np.abs(left_out(device, timings, False))
        outs.append(
            {
                "device": name,
                "median %": _percent(np.median(errors)),
                "90 % below %": _percent(np.quantile(errors, 0.9)),
                "largest %": _percent(errors.max()),
                "without decode cost: median %": _percent(np.median(plain)),
                "largest % ": _percent(plain.max()),
            }
        )
        targets.append(
            target(
                f"{name}: median error on a width left out, {DECODE} tokens or fewer",
                "<= 0.05",
                float(np.median(errors)),
            )
        )
    count = sum(map(len, points.values()))
    return Part(
        tables={
            "Latency model, fitted to published timings": fits,
            "Latency model, widths left out": outs,
        },
        targets=targets,
        notes=[
            f"Latency model: {count} {SOURCE}. Decode is {DECODE} tokens or fewer. Instructions "
            "are those per weight that the timings look like at the full issue rate, for 4 and for "
            "3 bits: whatever does not shrink with the bytes. Left out: Humming's decode timings "
            "of one width, predicted by a fit to its other seven. None of them was taken by us.",
        ],
    )


def _fit_row(device: Device, kernel: str, timings: Timings) -> Row:
    found = fitted(device, kernel, timings)
    errors = np.abs(relative_errors(device, found, timings))
    decode = errors[timings.tokens <= DECODE]
    costs: Mapping[int, float] = {}
    if found.kernel.instructions is not None:
        costs = found.kernel.instructions.value
    return {
        "device": device.name,
        "kernel": found.kernel.description,
        "timings": len(timings),
        "t0 µs": round(1e6 * found.t0, 1),
        "bandwidth": round(found.kernel.eta_bandwidth.value, 2),
        "peak": round(found.kernel.eta_peak.value, 2),
        "instructions": " / ".join(f"{costs[b]:.1f}" for b in (4, 3) if b in costs),
        "median %": _percent(np.median(errors)),
        "decode median %": _percent(np.median(decode)),
        "decode largest %": _percent(decode.max()),
    }


def _percent(value: float | np.floating) -> float:
    return round(100 * float(value), 1)

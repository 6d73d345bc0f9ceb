"""The numbers that ``report.html`` carries for its own scripts, packed to a few bytes each.

A page of 18,000 units in twelve formats stays below 3 MB: prices are 16-bit logarithms (0.02 %
exact), standard errors 8-bit ratios to them (2 % exact), formats and units are integers, names
share their beginnings, and the frontier keeps MOST_STOPS of its plans.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from ..models.wording import words_of
from ..quantizers.format import Format
from ..quantizers.runtimes import byte_count
from ..search.confidence import Confidence
from .binding import Economy
from .data import FrontierData, size_unit
from .run import RunData
from .words import short_names

MOST_STOPS = 2_048
RAMP = 33  # colours of a scale
LEVELS = 65_533  # of a price: 0 stands for none, 1 for zero
RATIOS = 254  # of a standard error: 0 stands for none
SMALLEST_RATIO, LARGEST_RATIO = 1e-3, 1e1
SHARES = 250  # steps of an agreement
TIE = 65_535


def page_data(run: RunData, frontier: FrontierData, found: Economy) -> dict[str, Any]:
    """Everything the report draws and explains, as JSON values.

    Args:
        run: The run.
        frontier: Its :func:`.data.frontier_data`.
        found: Its :func:`.binding.economy`.
    """
    table, formats = run.table, run.formats
    words, count = words_of(run.plan.calibration), byte_count(run.plan.runtime)
    parsed = [Format.parse(name) for name in formats]
    classes: dict[tuple[tuple[int, int], ...], int] = {}
    shapes = [classes.setdefault(unit.shapes, len(classes)) for unit in table.units]
    kinds = list(dict.fromkeys(u.kind for u in table.units if u.layer is not None))
    layers = sorted({unit.layer for unit in table.units if unit.layer is not None})
    unit_name, megabytes = size_unit(run.plan.total_bytes / 1e6)
    extra = len(formats) - len(table.formats)
    kl = np.pad(table.kl, ((0, 0), (0, extra)), constant_values=np.nan)
    stderr = np.pad(table.stderr, ((0, 0), (0, extra)), constant_values=0.0)
    short = short_names(formats)
    return {
        "size": {"name": unit_name, "bytes": 1e6 * megabytes},
        "weights": table.weights,
        "nats": words.nats,
        "drawn": words.drawn,
        "formats": [{"name": f.name, "short": short[f.name], "bits": f.bits} for f in parsed],
        "shapes": [
            {
                "text": " + ".join(f"{rows} × {cols}" for rows, cols in shape),
                "weights": sum(rows * cols for rows, cols in shape),
                "bytes": [sum(count(f, matrix) for matrix in shape) for f in parsed],
            }
            for shape in classes
        ],
        "kinds": kinds,
        "layers": layers,
        "units": {
            "names": _front_coded([unit.name for unit in table.units]),
            "shape": _packed(shapes, np.uint16),
            "kind": _packed([_place(u.kind, u.layer, kinds) for u in table.units], np.int16),
            "layer": _packed(
                [-1 if u.layer is None else layers.index(u.layer) for u in table.units], np.int16
            ),
        },
        "prices": _prices(kl, stderr),
        "allowed": _bits(found.problem.allowed, extra),
        "plan": _packed(run.choice, np.uint8),
        "frontier": _frontier(run),
        "lambda": found.prices.per_byte,
        "charges": _other_charges(run, found),
        "confidence": _confidence(run.confidence, formats),
        "chart": _chart(run, frontier),
        "refined": run.plan.refinement is not None,
        "ramps": {"bits": _ramp("viridis"), "kl": _ramp("magma_r")},
    }


def _frontier(run: RunData) -> dict[str, Any]:
    """The frontier's steps, all of them, and the stops of the slider: plans after some steps."""
    frontier = run.frontier
    count, small = len(frontier.bytes), len(frontier.units) <= 1 << 16
    stops = np.unique(np.linspace(0, count - 1, min(count, MOST_STOPS)).round().astype(np.int64))
    return {
        "start": _packed(frontier.start, np.uint8),
        "unit": _packed(frontier.step_unit, np.uint16 if small else np.uint32),
        "wide": not small,
        "format": _packed(frontier.step_format, np.uint8),
        "stops": _packed(stops, np.uint32),
        "bytes": frontier.bytes[stops].tolist(),
        "kl": [float(f"{kl:.5g}") for kl in frontier.predicted_kl[stops]],
    }


def _chart(run: RunData, data: FrontierData) -> dict[str, Any]:
    """Points of the frontier chart; sizes in bytes."""
    plan = run.plan
    measured = data.plan_measured
    return {
        "budget": round(1e6 * data.budget_megabytes),
        "plan": {"bytes": plan.bytes, "kl": plan.predicted_kl},
        "measured": None if measured is None else {"kl": measured.kl, "stderr": measured.stderr},
        "uniform": [
            {"name": p.name, "bytes": p.bytes, "kl": p.predicted_kl} for p in run.frontier.uniform
        ],
        "baselines": []
        if plan.kv_cache
        else [
            {
                "name": b.format or b.name,
                "uniform": b.format is not None,
                "bytes": b.bytes,
                "predicted": b.predicted_kl,
                "kl": b.kl,
                "stderr": b.kl_stderr,
            }
            for b in plan.baselines
        ],
    }


def _prices(kl: NDArray[np.float64], stderr: NDArray[np.float64]) -> dict[str, Any]:
    """Logarithms of the prices between the least and the largest, and relative errors."""
    positive = kl[np.isfinite(kl) & (kl > 0)]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    span = np.log(high / low) or 1.0
    usable = np.isfinite(kl) & (kl > 0)
    scaled = np.log(np.where(usable, kl, low) / low) / span
    code = np.where(usable, 2 + np.round(scaled * LEVELS), np.where(np.isnan(kl), 0, 1))
    ratio = np.divide(stderr, kl, out=np.zeros_like(kl), where=usable & np.isfinite(stderr))
    depth = np.log(np.clip(ratio, SMALLEST_RATIO, LARGEST_RATIO) / SMALLEST_RATIO)
    depth /= np.log(LARGEST_RATIO / SMALLEST_RATIO)
    error = np.where(ratio > 0, 1 + np.round(depth * RATIOS), 0)
    return {
        "low": low,
        "step": span / LEVELS,
        "kl": _packed(code, np.uint16),
        "errorLow": SMALLEST_RATIO,
        "errorStep": float(np.log(LARGEST_RATIO / SMALLEST_RATIO)) / RATIOS,
        "error": _packed(error, np.uint8),
    }


def _other_charges(run: RunData, found: Economy) -> str | None:
    """float32 [U, F], what options pay for limits besides the bytes; None without such limits."""
    if not any(found.prices.per_limit):
        return None
    other = found.charges() - found.prices.per_byte * found.problem.bytes
    extra = len(run.formats) - len(run.table.formats)
    return _packed(np.pad(other, ((0, 0), (0, extra))), np.float32)


def _confidence(found: Confidence | None, formats: Sequence[str]) -> dict[str, Any] | None:
    if found is None:
        return None
    index = {name: f for f, name in enumerate(formats)}
    more = np.where(np.isinf(found.more_sequences), TIE, np.minimum(found.more_sequences, TIE - 1))
    return {
        "agreement": _packed(np.round(found.agreement * SHARES), np.uint8),
        "shares": SHARES,
        "runner": _packed([index.get(name, 255) for name in found.runner_up], np.uint8),
        "more": _packed(more, np.uint16),
        "tie": TIE,
        "sequences": found.sequences,
        "resamples": found.resamples,
    }


def _bits(allowed: NDArray[np.bool_], extra: int) -> str | None:
    """The options that limits leave, eight to a byte; None if that is all of them."""
    if allowed.all():
        return None
    whole = np.pad(allowed, ((0, 0), (0, extra)))
    return _packed(np.packbits(whole.ravel(), bitorder="little"), np.uint8)


def _place(kind: str, layer: int | None, kinds: Sequence[str]) -> int:
    return -1 if layer is None else kinds.index(kind)


def _front_coded(names: Sequence[str]) -> list[Any]:
    """Names as [shared beginning, rest] with the name before: ``[0, "a.b"], [2, "c"]``."""
    coded, before = [], ""
    for name in names:
        pairs = zip(before, name, strict=False)
        short = min(len(before), len(name))
        shared = next((i for i, (old, new) in enumerate(pairs) if old != new), short)
        coded.append([shared, name[shared:]])
        before = name
    return coded


def _packed(values: Any, dtype: Any) -> str:
    """An array as base64 of its little-endian bytes."""
    array = np.ascontiguousarray(values).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(array.tobytes()).decode()


def _ramp(name: str) -> list[str]:
    colors = matplotlib.colormaps[name](np.linspace(0, 1, RAMP))
    return [to_hex(color) for color in colors]

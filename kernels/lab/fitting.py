"""The numbers of a kernel on a device, fitted to timings.

Every free number is fitted as a factor on the one there was before, in logarithms, and pulled back
to it so weakly that only what the timings do not show stays where it was: six timings are enough
to bring a device up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from ..latency import Device, Kernel, Number, Widths

OUTLIER = 0.03  # relative error from which on a timing counts less than its square
PULL = 0.02  # cost of moving a number by a factor of e, in relative errors of one timing
ALIKE = 0.3  # cost of two classes of widths being apart by a factor of e
SIMPLE_WIDTHS = (1, 2, 4, 8)  # codes that need no more than a shift and a mask
OTHER_WIDTHS = (3, 5, 6, 7)


@dataclass(frozen=True, slots=True)
class Timings:
    """P timings of one kernel on one device.

    Attributes:
        bits: int64 [P], bits per code; 16 or more for a matrix that is not quantized.
        rows: int64 [P], output features.
        cols: int64 [P], input features.
        tokens: int64 [P], vectors at a time.
        weight_bytes: float64 [P], bytes read of the matrix.
        seconds: float64 [P].
    """

    bits: NDArray[np.int64]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    tokens: NDArray[np.int64]
    weight_bytes: NDArray[np.float64]
    seconds: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.seconds)

    def where(self, keep: NDArray[np.bool_]) -> Timings:
        """Some of the timings: bool [P]."""
        whole = (self.bits[keep], self.rows[keep], self.cols[keep], self.tokens[keep])
        return Timings(*whole, self.weight_bytes[keep], self.seconds[keep])


class Freedom(NamedTuple):
    """What a fit may change.

    Attributes:
        decode: Groups of widths whose instructions per weight move together.
        alike: Cost of moving a later group away from the first by a factor of e.
        most: The most that an efficiency may become.
    """

    decode: tuple[tuple[int, ...], ...] = ()
    alike: float = 0.0
    most: float = 1.3


NO_DECODE = Freedom()
TWO_CLASSES = Freedom((SIMPLE_WIDTHS, OTHER_WIDTHS), ALIKE)


@dataclass(frozen=True, slots=True)
class Fit:
    """A kernel as fitted, and its ``t0`` in seconds."""

    kernel: Kernel
    t0: float


def fit(
    device: Device, name: str, timings: Timings, freedom: Freedom, source: str, t0: float = 1e-5
) -> Fit:
    """Fit a kernel's efficiencies, decode cost and ``t0`` to timings.

    The loss is ``soft_l1`` of relative errors: a few odd timings do not move the fit.

    Args:
        device: The device, with the kernel as it was.
        name: The kernel.
        timings: At least as many timings as numbers to fit.
        freedom: Which numbers may change.
        source: What the timings are, for the result.
        t0: Where to start with ``t0``, seconds.

    Raises:
        ValueError: If there are too few timings, or one is not positive.
    """
    kernel = device.kernels[name]
    free = 3 + len(freedom.decode)
    if len(timings) < free:
        raise ValueError(
            f"{len(timings)} timings of {name!r} are too few to fit {free} numbers. Measure more "
            "shapes, widths or numbers of tokens."
        )
    if not (timings.seconds > 0).all():
        raise ValueError(f"A timing of {name!r} is {timings.seconds.min()} s; it must be positive.")
    before = np.array([t0, kernel.eta_bandwidth.value, kernel.eta_peak.value])
    highest = np.array([100 * t0, freedom.most, freedom.most])
    bounds = np.log(np.array([1e-3 * np.ones(3), highest / before]))
    decode = np.full((2, len(freedom.decode)), np.log([[1e-3], [1e3]]))
    bounds = np.concatenate([bounds, decode], axis=1)

    def residuals(theta: NDArray[np.float64]) -> NDArray[np.float64]:
        start, moved = _moved(kernel, freedom, t0, theta)
        errors = np.log(predict(device, moved, start, timings) / timings.seconds)
        apart = freedom.alike * (theta[4:] - theta[3:4])
        return np.concatenate([errors, PULL * theta, apart])

    found = min(
        (
            least_squares(residuals, at, bounds=bounds, loss="soft_l1", f_scale=OUTLIER)
            for at in _starts(device, kernel, timings, freedom, bounds)
        ),
        key=lambda result: float(result.cost),
    )
    start, moved = _moved(kernel, freedom, t0, found.x)
    return Fit(_with_source(kernel, moved, source, bool(freedom.decode)), start)


def _starts(
    device: Device,
    kernel: Kernel,
    timings: Timings,
    freedom: Freedom,
    bounds: NDArray[np.float64],
) -> list[NDArray[np.float64]]:
    """Where to start: as before, and as if decoding took most of the time.

    The fourth power hides a part that is small, so a search from there cannot find out that it
    matters.
    """
    decode = np.zeros(len(freedom.decode))
    if kernel.instructions is not None:
        rate = timings.seconds * device.issue_rate.value * kernel.eta_issue.value
        costs = rate / (timings.rows * timings.cols)  # instructions per weight in that time
        for i, widths in enumerate(freedom.decode):
            of_width = np.isin(timings.bits, widths)
            if of_width.any():
                before = kernel.decode(timings.bits[of_width])
                decode[i] = np.log(np.maximum(0.8 * costs[of_width] / before, 1e-3).min())
    starts = [np.zeros(3 + len(decode)), np.concatenate([np.zeros(3), decode])]
    return [np.clip(at, bounds[0] + 1e-6, bounds[1] - 1e-6) for at in starts]


def predict(device: Device, kernel: Kernel, t0: float, timings: Timings) -> NDArray[np.float64]:
    """Seconds [P] that the model gives for the products of some timings."""
    t = timings
    return t0 + device.work(kernel, t.bits, t.rows, t.cols, t.tokens, t.weight_bytes)


def relative_errors(device: Device, found: Fit, timings: Timings) -> NDArray[np.float64]:
    """How far predictions are from timings [P]: 0.05 is five percent too slow."""
    return predict(device, found.kernel, found.t0, timings) / timings.seconds - 1


def without_each_width(
    device: Device, name: str, timings: Timings, freedom: Freedom, most_tokens: int
) -> dict[int, NDArray[np.float64]]:
    """Relative errors on each width with at most so many tokens, fitted without that width."""
    errors = {}
    for bits in np.unique(timings.bits).tolist():
        others = fit(device, name, timings.where(timings.bits != bits), freedom, "the other widths")
        asked = timings.where((timings.bits == bits) & (timings.tokens <= most_tokens))
        errors[bits] = relative_errors(device, others, asked)
    return errors


def _moved(
    kernel: Kernel, freedom: Freedom, t0: float, theta: NDArray[np.float64]
) -> tuple[float, Kernel]:
    """``t0`` and the kernel with its free numbers multiplied by exp(theta)."""
    start, bandwidth, peak, *decode = np.exp(theta).tolist()
    update: dict[str, Number | Widths] = {
        "eta_bandwidth": _times(kernel.eta_bandwidth, bandwidth),
        "eta_peak": _times(kernel.eta_peak, peak),
    }
    if kernel.instructions is not None and decode:
        value = dict(kernel.instructions.value)
        for widths, factor in zip(freedom.decode, decode, strict=True):
            value |= {bits: value[bits] * factor for bits in widths if bits in value}
        update["instructions"] = kernel.instructions.model_copy(update={"value": value})
    return t0 * start, kernel.model_copy(update=update)


def _times(number: Number, factor: float) -> Number:
    return number.model_copy(update={"value": number.value * factor})


def _with_source(before: Kernel, after: Kernel, source: str, decode: bool) -> Kernel:
    """Say what was fitted, and round to what such fits can show."""
    origin = {"basis": "fitted", "source": source}
    update: dict[str, Number | Widths] = {}
    for name in ("eta_bandwidth", "eta_peak"):
        value = _rounded(getattr(after, name).value)
        update[name] = getattr(before, name).model_copy(update=origin | {"value": value})
    if decode and after.instructions is not None:
        costs = {b: _rounded(cost) for b, cost in sorted(after.instructions.value.items())}
        update["instructions"] = after.instructions.model_copy(update=origin | {"value": costs})
    return after.model_copy(update=update)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def timings_of(rows: Sequence[tuple[int, int, int, int, float, float]]) -> Timings:
    """Timings from rows of bits, rows, cols, tokens, bytes of the matrix and seconds."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    whole = table[:, :4].astype(np.int64)
    shapes = (whole[:, 0], whole[:, 1], whole[:, 2], whole[:, 3])
    return Timings(*shapes, table[:, 4], table[:, 5])

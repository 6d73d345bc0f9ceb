"""The figures of a run.  Each draws the numbers of ``data.py``, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from ..quantizers.format import Format
from .canvas import (
    GREEN,
    INK,
    LIGHT_BLUE,
    PLAIN,
    RED,
    Label,
    drawing,
    fix_layout,
    marker_box,
    place_labels,
)
from .data import MIXED, FrontierData, Point, PredictionData, SensitivityData, UnitGrid, size_unit
from .panels import (
    MAX_BARS,
    annotate_cells,
    bar_panel,
    bits_norm,
    dot_panel,
    grid_panel,
    heights,
    log_norm,
    total_height,
)
from .words import number, short_names, with_error

_FAR = 2.2  # times the plan's size: 16-bit floats would squeeze all other plans to the left
_DRAWN = 1_200  # points of a curve
_BITS_TICKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)


def plot_frontier(data: FrontierData, path: Path) -> None:
    """Draw KL against size: frontier, lower bound, uniform plans, and the plan."""
    unit, megabytes = size_unit(max(data.frontier.megabytes[-1], data.plan.megabytes))

    def predicted(points: Sequence[Point], marker: str, color: str, size: float) -> Line2D:
        x, y = [p.megabytes / megabytes for p in points], [p.kl for p in points]
        (line,) = axes.plot(x, y, marker, mec=color, mfc="none", mew=1.5, ms=size, zorder=4)
        return line

    def measured(
        points: Sequence[Point], marker: str, color: str, size: float
    ) -> ErrorbarContainer:
        x, y = [p.megabytes / megabytes for p in points], [p.kl for p in points]
        errors = [p.stderr or 0.0 for p in points]
        return axes.errorbar(x, y, errors, fmt=marker, color=color, ms=size, capsize=4, zorder=5)

    with drawing(path, height=5.8) as figure:
        axes = figure.add_subplot()
        x, y = _thinned(data.bound.megabytes) / megabytes, _thinned(data.bound.kl)
        (bound,) = axes.plot(x, y, color=INK, lw=1.1, zorder=3)
        x, y = _thinned(data.frontier.megabytes) / megabytes, _thinned(data.frontier.kl)
        (frontier,) = axes.plot(x, y, "o", color=LIGHT_BLUE, ms=6)
        budget = axes.axvline(data.budget_megabytes / megabytes, color=GREEN, lw=1.3, ls=":")
        legend: dict[str, Any] = {  # lines and error bars
            "optimal plans, predicted": frontier,
            "lower bound for every plan, predicted": bound,
            "budget": budget,
            "this plan, predicted": predicted([data.plan], "D", GREEN, 11),
        }
        if data.plan_measured:
            legend["this plan, measured"] = measured([data.plan_measured], "D", GREEN, 5)
        if data.uniform:
            legend["one format everywhere, predicted"] = predicted(data.uniform, "s", RED, 8)
        if uniform := [p for p in data.measured if p.uniform]:
            legend["one format everywhere, measured"] = measured(uniform, "o", RED, 4.5)
        if mixed := [p for p in data.measured if not p.uniform]:
            legend["other plans, measured"] = measured(mixed, "^", INK, 6)
        axes.legend(legend.values(), legend.keys(), loc="upper right", fontsize=9.5)
        _frontier_axes(axes, data, unit, megabytes)
        _frontier_labels(figure, axes, data, megabytes)


def _frontier_axes(axes: Axes, data: FrontierData, unit: str, megabytes: float) -> None:
    """Scales, limits, titles and legend of the frontier figure."""
    points = [p for p in _points(data) if p.kl > 0 and p.megabytes <= _FAR * data.plan.megabytes]
    if points:
        axes.set_yscale("log")
        low = min(p.kl for p in points)
        high = max(*(p.kl for p in points), data.frontier.kl[0])
        axes.set_ylim(low / 2.5, high * 2)
        left = float(min(*(p.megabytes for p in points), data.frontier.megabytes[0]))
        right = max(*(p.megabytes for p in points), data.budget_megabytes)
        margin = 0.04 * (right - left) + 0.005 * right
        axes.set_xlim((left - margin) / megabytes, (right + 2 * margin) / megabytes)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_major_formatter(PLAIN)
    if points and high < 30 * low:  # few powers of ten in sight
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(PLAIN)
    else:
        axes.yaxis.set_minor_formatter("")
    axes.grid(True, which="major")
    axes.set_xlabel(f"stored size ({unit})")
    axes.set_ylabel(f"KL to the original model ({data.nats})")
    bpw = 8e6 * megabytes / data.weights
    top = axes.secondary_xaxis(
        "top",
        functions=(lambda x: np.multiply(x, bpw), lambda x: np.divide(x, bpw)),
    )
    top.spines["top"].set_visible(True)
    top.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    top.set_xlabel("bits per weight, scales and zero points included")


def _frontier_labels(figure: Figure, axes: Axes, data: FrontierData, megabytes: float) -> None:
    """Name the plan and as many uniform plans as there is room for, measured ones first."""
    fix_layout(figure)
    best = data.plan_measured or data.plan
    kind = "predicted" if best.stderr is None else "measured"
    words = (
        f"this plan, {kind}\n{best.bpw:.2f} bits per weight\nKL {with_error(best.kl, best.stderr)}"
    )
    measured = {p.name for p in data.measured}
    named = [*data.measured, *(p for p in data.uniform if p.name not in measured)]
    names = short_names([p.name for p in named])
    mixed = {p.name for p in data.measured if not p.uniform}

    legend = axes.get_legend()
    taken = [
        marker_box(figure, axes, p.megabytes / megabytes, p.kl) for p in _points(data) if p.kl > 0
    ]
    if legend is not None:
        taken.append(legend.get_window_extent())
    taken += [
        marker_box(figure, axes, size / megabytes, kl, radius=2)
        for size, kl in zip(_thinned(data.bound.megabytes), _thinned(data.bound.kl), strict=True)
        if kl > 0
    ]
    labels = [Label(words, best.megabytes / megabytes, best.kl, GREEN, ("SW", "S", "far S"), True)]
    for point in named:
        color = INK if point.name in mixed else RED
        labels.append(Label(names[point.name], point.megabytes / megabytes, point.kl, color))
    place_labels(axes, [label for label in labels if label.y > 0], taken)


def _thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most _DRAWN of the values, evenly spread and with both ends: more cannot be seen."""
    if len(values) <= _DRAWN:
        return values
    return values[np.linspace(0, len(values) - 1, _DRAWN).round().astype(np.intp)]


def _points(data: FrontierData) -> list[Point]:
    """Every marker of the frontier figure."""
    return [*data.uniform, *data.measured, data.plan, *filter(None, [data.plan_measured])]


def plot_allocation(grid: UnitGrid, path: Path) -> None:
    """Draw bits per weight by layer and kind of matrix, and of the units outside the layers."""
    norm = bits_norm(_all_values(grid))
    areas = heights(grid, heat_maps=1)
    with drawing(path, total_height(areas)) as figure:
        layout = figure.add_gridspec(len(areas), 1, height_ratios=areas)
        if grid.kinds:
            axes = figure.add_subplot(layout[0])
            ticks = [b for b in _BITS_TICKS if (norm.vmin or 0) <= b <= (norm.vmax or 0)]
            grid_panel(figure, axes, grid, norm, "viridis", "bits per weight", ticks)
            annotate_cells(axes, grid, norm, _bit_width)
            axes.set_title("Bits per weight by layer and kind of matrix")
        if grid.others:
            axes = figure.add_subplot(layout[-1])
            units = grid.others[:MAX_BARS]
            bar_panel(axes, units, norm, "viridis", lambda u: f"{u.value:.2f}   {u.format}")
            axes.set_title(_others_title("Bits per weight", grid))
            axes.set_xlabel("bits per weight")


def plot_sensitivity(data: SensitivityData, path: Path) -> None:
    """Draw the predicted KL of every unit in one format: per unit, and per million weights."""
    panels = (
        (data.kl, f"Predicted KL when only this is stored in {data.format}", data.nats),
        (data.density, "The same per million weights", f"{data.nats} / million weights"),
    )
    areas = heights(data.kl, heat_maps=2)
    with drawing(path, total_height(areas)) as figure:
        layout = figure.add_gridspec(len(areas), 2, height_ratios=areas)
        for index, (grid, title, unit) in enumerate(panels):
            norm = log_norm(_all_values(grid))
            if grid.kinds:
                axes = figure.add_subplot(layout[index, :])
                grid_panel(figure, axes, grid, norm, "magma_r", unit)
                axes.set_title(title)
            if grid.others:
                axes = figure.add_subplot(layout[-1, index])
                dot_panel(axes, grid.others[:MAX_BARS], norm, "magma_r", lambda u: number(u.value))
                alone = _others_title(f"KL in {data.format}", grid)
                axes.set_title("Per million weights" if index else alone)
                axes.set_xlabel(unit)
                axes.tick_params(labelleft=index == 0)


def plot_prediction(data: PredictionData, path: Path) -> None:
    """Draw measured against predicted KL: points on the diagonal were predicted exactly."""
    checks = [c for c in data.checks if c.predicted > 0 and c.measured > 0]
    with drawing(path, height=5.8) as figure:
        axes = figure.add_subplot()
        values = [v for c in checks for v in (c.predicted, c.measured)] or [0.1, 1.0]
        low, high = min(values) / 1.6, max(values) * 1.6
        (exact,) = axes.plot([low, high], [low, high], color=INK, lw=1.1, zorder=2)
        axes.fill_between([low, high], [low / 2, high / 2], [low * 2, high * 2], color="#EFEFEF")
        legend: dict[str, Any] = {"measured as predicted (grey: within a factor of 2)": exact}
        for color, marker, label, group in (
            (GREEN, "D", "this plan", checks[:1]),
            (RED, "o", "one format everywhere", [c for c in checks[1:] if c.uniform]),
            (INK, "^", "other plans", [c for c in checks[1:] if not c.uniform]),
        ):
            if group:
                legend[label] = axes.errorbar(
                    [c.predicted for c in group],
                    [c.measured for c in group],
                    yerr=[c.stderr for c in group],
                    xerr=[min(c.predicted_stderr, 0.95 * c.predicted) for c in group],
                    fmt=marker,
                    color=color,
                    ms=6,
                    capsize=3,
                    zorder=5,
                )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.legend(legend.values(), legend.keys(), loc="upper left", fontsize=9.5)
        axes.grid(True, which="major")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PLAIN)
            axis.set_minor_formatter("")
        axes.set_xlabel(f"predicted KL ({data.nats})")
        axes.set_ylabel(f"measured KL ({data.nats})")
        fix_layout(figure)
        taken = [marker_box(figure, axes, c.predicted, c.measured) for c in checks]
        taken += [box.get_window_extent() for box in [axes.get_legend()] if box is not None]
        names = short_names([c.name for c in checks])
        sides = ("E", "SE", "NE", "W", "NW")
        labels = [Label(names[c.name], c.predicted, c.measured, INK, sides) for c in checks]
        place_labels(axes, labels, taken)


def _all_values(grid: UnitGrid) -> NDArray[np.float64]:
    return np.array([*grid.values.flat, *(unit.value for unit in grid.others)])


def _bit_width(name: str) -> str:
    return "~" if name == MIXED else str(Format.parse(name).bits)


def _others_title(what: str, grid: UnitGrid) -> str:
    where = "outside the layers" if grid.kinds else "of every unit"
    more = len(grid.others) - MAX_BARS
    return f"{what} {where}" + (
        f" (the first {MAX_BARS} of {len(grid.others)})" if more > 0 else ""
    )

"""Two ways to show one number per unit: a heat map of kinds and layers, and a list of bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from numpy.typing import NDArray

from .canvas import INK, PLAIN, WIDTH
from .data import UnitGrid, UnitValue

MAX_BARS = 60
_ROW, _BAR, _FRAME = 0.36, 0.26, 0.8  # inches: a heat map row, a bar, title and axis
_GRID_WIDTH = 0.74 * WIDTH  # about what labels and colour bar leave, inches
_DECADES = 4.0


def heights(grid: UnitGrid, heat_maps: int) -> list[float]:
    """Inches of the drawn areas: ``heat_maps`` heat maps if there are layers, then the bars."""
    maps = [len(grid.kinds) * _ROW] * heat_maps if grid.kinds else []
    return maps + ([min(len(grid.others), MAX_BARS) * _BAR] if grid.others else [])


def total_height(areas: Sequence[float]) -> float:
    """Inches of a figure with these areas below each other, titles and axes included."""
    return sum(areas) + _FRAME * len(areas)


def bits_norm(values: NDArray[np.float64]) -> LogNorm:
    """A logarithmic colour scale from one whole number of bits to another."""
    known = values[np.isfinite(values)]
    low = max(0.5, float(np.floor(known.min())))
    return LogNorm(low, max(2 * low, float(np.ceil(known.max()))))


def log_norm(values: NDArray[np.float64]) -> LogNorm:
    """A logarithmic colour scale for the positive ``values``, at most four decades deep."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return LogNorm(0.1, 1.0)
    high = float(positive.max())
    return LogNorm(max(0.9 * float(positive.min()), high / 10**_DECADES), 1.1 * high, clip=True)


def grid_panel(
    figure: Figure,
    axes: Axes,
    grid: UnitGrid,
    norm: LogNorm,
    colors: str,
    unit: str,
    ticks: Sequence[float] | None = None,
) -> None:
    """Draw kinds x layers as a heat map with a colour bar in ``unit``; empty cells stay grey."""
    axes.set_facecolor("#EDEDED")
    values = np.ma.masked_invalid(grid.values)
    mesh = axes.pcolormesh(values, norm=norm, cmap=colors, edgecolors="white", linewidth=0.8)
    axes.set_yticks(np.arange(len(grid.kinds)) + 0.5, grid.kinds)
    step = max(1, round(len(grid.layers) / 24))
    shown = np.arange(0, len(grid.layers), step)
    axes.set_xticks(shown + 0.5, [str(grid.layers[i]) for i in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set_xlabel("layer")
    _colorbar(figure, axes, mesh, unit, ticks)


def annotate_cells(axes: Axes, grid: UnitGrid, norm: LogNorm, text: Callable[[str], str]) -> None:
    """Write the formats into the cells if all fit, else ``text(format)`` if there is room."""
    width = 72 * _GRID_WIDTH / len(grid.layers)  # points
    names = {name for line in grid.formats for name in line if name}
    longest = max(map(len, names))
    full = 7.5 * 0.65 * longest < width
    size = 7.5 if full else min(8.5, 0.65 * width)
    if size < 4.5:
        return
    cmap = axes.collections[0].get_cmap()
    for (row, column), value in np.ndenumerate(grid.values):
        name = grid.formats[row][column]
        if name:
            r, g, b, _ = cmap(norm(value))
            ink = "white" if 0.299 * r + 0.587 * g + 0.114 * b < 0.45 else INK
            words = name if full else text(name)
            axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", fontsize=size,
                      color=ink)  # fmt: skip


def bar_panel(
    axes: Axes,
    units: Sequence[UnitValue],
    norm: LogNorm,
    colors: str,
    text: Callable[[UnitValue], str],
) -> None:
    """Draw one horizontal bar per unit, with ``text`` behind it, on a linear axis."""
    values = [unit.value for unit in units]
    axes.barh(range(len(units)), values, 0.74, color=matplotlib.colormaps[colors](norm(values)),
              edgecolor="#555555", linewidth=0.5)  # fmt: skip
    axes.set_xlim(0, 1.4 * max(values))
    _unit_rows(axes, units, text)


def dot_panel(
    axes: Axes,
    units: Sequence[UnitValue],
    norm: LogNorm,
    colors: str,
    text: Callable[[UnitValue], str],
) -> None:
    """Draw one dot per unit, with its standard error and ``text``, on a logarithmic axis."""
    axes.set_xscale("log")
    axes.set_xlim(float(norm.vmin or 0) / 2, float(norm.vmax or 1) * 6)
    axes.grid(True, which="major", axis="x")
    for row, unit in enumerate(units):
        color = matplotlib.colormaps[colors](norm(unit.value))
        axes.errorbar(unit.value, row, xerr=unit.stderr or None, fmt="o", ms=7, mfc=color,
                      mec="#555555", ecolor="#555555")  # fmt: skip
    axes.xaxis.set_minor_locator(NullLocator())
    _unit_rows(axes, units, text)


def _unit_rows(axes: Axes, units: Sequence[UnitValue], text: Callable[[UnitValue], str]) -> None:
    """Name the rows, and write the text of each behind its value."""
    left = axes.get_xlim()[0]
    for row, unit in enumerate(units):
        if np.isfinite(unit.value):
            axes.annotate(text(unit), (max(left, unit.value + unit.stderr), row), xytext=(7, 0),
                          textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
    axes.set_yticks(range(len(units)), [_elide(unit.name) for unit in units], fontsize=9)
    axes.set_ylim(len(units) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(PLAIN)


def _elide(name: str, longest: int = 44) -> str:
    """A name that fits beside a bar: the ends tell units apart, the middle does not."""
    if len(name) <= longest:
        return name
    return f"{name[: longest // 3]}…{name[-(longest - longest // 3 - 1) :]}"


def _colorbar(
    figure: Figure, axes: Axes, mesh: QuadMesh, unit: str, ticks: Sequence[float] | None
) -> None:
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=18, fraction=0.05)
    bar.set_label(unit, fontsize=9.5)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(10, (1, 3)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(PLAIN)
    bar.ax.tick_params(labelsize=9)

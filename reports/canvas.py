"""What the figures share: style, atomic PNG and SVG files, and labels that never overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from .._base.files import atomic_path

# After Okabe and Ito's palette, told apart with every kind of colour vision; darker for text.
LIGHT_BLUE, RED, GREEN, INK = "#8CC5EC", "#C85200", "#007A5A", "#222222"
WIDTH = 9.6  # inches: 1,920 pixels
PLAIN = FuncFormatter(lambda value, _: f"{value:.10g}")  # 0.01, not $10^{-2}$
_DPI = 200
_STYLE: Any = {  # the type of its keys differs between versions of matplotlib
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "svg.hashsalt": "bitplan",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def drawing(path: Path, height: float) -> Iterator[Figure]:
    """Yield an empty figure ``height`` inches high; afterwards it is written as PNG and SVG.

    Args:
        path: Of the PNG; the SVG beside it has the same name.
        height: Inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            fix_layout(figure)
        # No software version and no date in the files: the same numbers give the same bytes.
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
        with atomic_path(path.with_suffix(".svg")) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def fix_layout(figure: Figure) -> None:
    """Find the layout, once: what is drawn afterwards, and both files, keep it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


class Label(NamedTuple):
    """A text wanted beside the point ``(x, y)``.

    Attributes:
        text: What to write.
        x: In data coordinates.
        y: In data coordinates.
        color: Of the text.
        angles: Where it may go, best first: compass points.
        bold: Whether it stands out; then it is written even where it covers something.
    """

    text: str
    x: float
    y: float
    color: str
    angles: Sequence[str] = ("NE", "E", "N", "SE", "NW", "W", "SW", "S")
    bold: bool = False


_OFFSETS = {  # dx and dy in points, then the alignment of the text
    "NE": (6, 5, "left", "bottom"),
    "E": (9, 0, "left", "center"),
    "N": (0, 9, "center", "bottom"),
    "SE": (6, -5, "left", "top"),
    "NW": (-6, 5, "right", "bottom"),
    "W": (-9, 0, "right", "center"),
    "SW": (-8, -6, "right", "top"),
    "S": (0, -11, "center", "top"),
    "far S": (-4, -110, "left", "top"),
}


def place_labels(axes: Axes, labels: Sequence[Label], taken: Sequence[Bbox]) -> None:
    """Write the labels in order of importance, leaving out those without a free place.

    The layout must be final (:func:`fix_layout`).

    Args:
        axes: Where to write.
        labels: The labels, the most important first.
        taken: Boxes to keep free, in display coordinates.
    """
    occupied, inside = list(taken), axes.get_window_extent()
    for label in labels:
        for angle in label.angles:
            dx, dy, horizontal, vertical = _OFFSETS[angle]
            note = axes.annotate(
                label.text,
                (label.x, label.y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=label.color,
                fontsize=9.5 if label.bold else 8.5,
                fontweight="bold" if label.bold else "normal",
                arrowprops=_leader(label.color) if dy < -50 else None,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=7,
            )
            note.set_in_layout(False)
            note.get_window_extent()  # moves the text to its place
            box = Text.get_window_extent(note)  # without the leader
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1
            within &= inside.y0 <= box.y0 and box.y1 <= inside.y1
            free = within and not any(box.overlaps(other) for other in occupied)
            if free or (label.bold and angle == label.angles[-1]):
                occupied.append(box)
                break
            note.remove()


def _leader(color: str) -> dict[str, Any]:
    return {"arrowstyle": "-", "color": color, "relpos": (0.03, 1)}


def marker_box(figure: Figure, axes: Axes, x: float, y: float, radius: float = 5) -> Bbox:
    """The display box ``radius`` points around the data coordinates ``(x, y)``."""
    center = axes.transData.transform((x, y))
    pixels = radius * figure.dpi / 72
    return Bbox([center - pixels, center + pixels])

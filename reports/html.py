"""``report.html``: everything about a run in one file that needs no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .._base.files import atomic_path
from ..jobs.folder import RunFolder
from ..models.wording import words_of
from ..search.coverage import bits_per
from .binding import economy, limit_rows
from .data import (
    allocation_data,
    format_shares,
    frontier_data,
    prediction_data,
    sensitivity_data,
    size_unit,
    unit_rows,
)
from .embed import page_data
from .plots import plot_allocation, plot_frontier, plot_prediction, plot_sensitivity
from .prose import (
    allocation_alt,
    comparison_cells,
    frontier_alt,
    headline,
    prediction_alt,
    price_note,
    provenance,
    sensitivity_alt,
    tiles,
    unit_cells,
    verdict,
)
from .run import RunData
from .summary import comparison

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("core.js", "frontier.js", "grids.js", "why.js", "page.js")
MOST_ROWS = 1_000  # of the table of units that is there without scripts
MOST_WITH_PICTURES = 5_000  # units; the data of more needs the room of pictures


class Picture(NamedTuple):
    """A figure of the report: ``alt`` says in words what it shows."""

    alt: str
    path: Path

    @property
    def source(self) -> str:
        """The PNG as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


def write_report(run_dir: Path) -> list[Path]:
    """Draw the figures of a run and write its ``report.html``.

    Args:
        run_dir: A folder with plan.json, frontier.json and profile.safetensors.

    Returns:
        The files written: every figure as PNG and as SVG, then report.html.

    Raises:
        ValueError: If a file of the run is missing or invalid, or they do not belong together.
    """
    run, folder = RunData.load(run_dir), RunFolder(run_dir)
    frontier, prediction = frontier_data(run), prediction_data(run)
    allocation, sensitivity = allocation_data(run), sensitivity_data(run)
    pictures = {
        "frontier": Picture(frontier_alt(frontier), folder.figure("frontier")),
        "allocation": Picture(allocation_alt(allocation), folder.figure("allocation")),
        "sensitivity": Picture(sensitivity_alt(sensitivity), folder.figure("sensitivity")),
    }
    plot_frontier(frontier, pictures["frontier"].path)
    plot_allocation(allocation, pictures["allocation"].path)
    plot_sensitivity(sensitivity, pictures["sensitivity"].path)
    if prediction.checks:
        pictures["prediction"] = Picture(prediction_alt(prediction), folder.figure("prediction"))
        plot_prediction(prediction, pictures["prediction"].path)
    report = folder.report
    with atomic_path(report) as temporary:
        temporary.write_text(render_report(run, pictures), encoding="utf-8")
    paths = [picture.path for picture in pictures.values()]
    return [*(file for path in paths for file in (path, path.with_suffix(".svg"))), report]


def render_report(run: RunData, pictures: Mapping[str, Picture]) -> str:
    """The report of a run as self-contained HTML.

    Args:
        run: The run.
        pictures: Figures by name, for readers without scripts.
    """
    plan, found, frontier = run.plan, economy(run), frontier_data(run)
    rows = comparison(plan, run.frontier.uniform)
    text = plan.measured is None or plan.measured.ppl is not None
    words = words_of(plan.calibration)
    units = unit_rows(run) if len(run.table.units) <= MOST_ROWS else []
    return render(
        "report.html",
        data=page_data(run, frontier, found),
        scripts=SCRIPTS,
        plan=plan,
        words=words,
        headline=headline(plan),
        bits_per=bits_per(plan.coverage),
        verdict=verdict(plan, rows),
        tiles=tiles(plan, rows),
        pictures=pictures,
        embedded=len(run.table.units) <= MOST_WITH_PICTURES,
        comparison=[comparison_cells(row, row is rows[0], text, words.many) for row in rows],
        limits=limit_rows(run, found, size_unit(plan.total_bytes / 1e6)),
        limits_note=found.note,
        shares=[
            (share.format, share.units, 100 * share.weights, 100 * share.bytes)
            for share in format_shares(run)
        ],
        units=[unit_cells(row) for row in units],
        unit_count=len(run.table.units),
        price_note=price_note(plan),
        resampled=run.confidence,
        provenance=provenance(plan),
    )


def render(template: str, *, data: Any, scripts: Sequence[str], **values: Any) -> str:
    """A page of ``assets`` with its styles, scripts and data inside.

    Args:
        template: Name of the page.
        data: JSON values for the scripts.
        scripts: Names of the scripts, in the order they run.
        values: What the template shows.
    """
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        # "<" would end the script early in a name such as "</script>".
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
        script="\n".join((ASSETS / name).read_text(encoding="utf-8") for name in scripts),
        **values,
    )

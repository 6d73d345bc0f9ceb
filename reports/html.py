"""``report.html``: everything about a run in one file that needs no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..quantizers.files import atomic_path
from ..search.budget import format_bytes
from ..search.plan import Plan
from .data import (
    FrontierData,
    RunData,
    SensitivityData,
    UnitGrid,
    UnitRow,
    allocation_data,
    format_shares,
    frontier_data,
    sensitivity_data,
    unit_rows,
)
from .plots import plot_allocation, plot_frontier, plot_sensitivity
from .summary import Comparison, best_uniform, comparison, describe_rival, facts, only_format
from .words import UNIFORM, number, with_error

TOLD = (
    "optimality",
    "refined",
    "KV cache",
    "memory",
    "time",
    "time is a model",
    "runtime",
    "solver note",
)  # of the facts


class Picture(NamedTuple):
    """A figure of the report: ``alt`` says in words what it shows."""

    title: str
    caption: str
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
        The files written: frontier.png, allocation.png, sensitivity.png, report.html.

    Raises:
        ValueError: If a file of the run is missing or invalid, or they do not belong together.
    """
    run = RunData.load(run_dir)
    frontier, allocation, sensitivity = (
        frontier_data(run),
        allocation_data(run),
        sensitivity_data(run),
    )
    pictures = [
        Picture(
            "Size and quality",
            "Every dot is a plan that no other beats at its size, as predicted; the line is a "
            "proven lower bound for all plans. Open markers are predictions, filled ones "
            "measurements with their standard error.",
            _frontier_alt(frontier),
            run_dir / "frontier.png",
        ),
        Picture(
            "Where the bits go",
            "Stored bits per weight, scales and zero points included. The digit is the width of "
            "the codes.",
            _allocation_alt(allocation),
            run_dir / "allocation.png",
        ),
        Picture(
            "What is sensitive",
            f"Predicted KL when one matrix alone is stored in {sensitivity.format} and everything "
            "else stays as it was. The second map divides by the size of the matrix: what a "
            "solver weighs.",
            _sensitivity_alt(sensitivity),
            run_dir / "sensitivity.png",
        ),
    ]
    plot_frontier(frontier, pictures[0].path)
    plot_allocation(allocation, pictures[1].path)
    plot_sensitivity(sensitivity, pictures[2].path)
    report = run_dir / "report.html"
    with atomic_path(report) as temporary:
        temporary.write_text(render_report(run, pictures), encoding="utf-8")
    return [*(picture.path for picture in pictures), report]


def render_report(run: RunData, pictures: Sequence[Picture]) -> str:
    """The report of a run as self-contained HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plan = run.plan
    rows = comparison(plan, run.frontier.uniform)
    return environment.get_template("template.html").render(
        plan=plan,
        headline=_headline(plan),
        verdict=_verdict(plan, rows),
        tiles=_tiles(plan, rows),
        pictures=pictures,
        comparison=[_comparison_cells(row, row is rows[0]) for row in rows],
        shares=[
            (share.format, share.units, 100 * share.weights, 100 * share.bytes)
            for share in format_shares(run)
        ],
        units=[_unit_cells(row) for row in unit_rows(run)],
        provenance=_provenance(plan),
    )


def _headline(plan: Plan) -> str:
    measured = plan.measured
    if measured is not None:
        kl = f"KL {with_error(measured.kl, measured.kl_stderr)} nats per token measured"
    else:
        kl = (
            f"KL {with_error(plan.predicted_kl, plan.predicted_kl_stderr)} nats per token predicted"
        )
    before, after = format_bytes(2 * plan.weights), format_bytes(plan.bytes)
    return _unbroken(f"{before} → {after}, {plan.bpw:.2f} bits per weight, {kl}")


def _verdict(plan: Plan, rows: Sequence[Comparison]) -> list[str]:
    """How good the plan is, in sentences."""
    sentences = []
    if same := only_format(plan):
        sentences.append(f"Every unit is stored in the same format, {same}.")
    if rival := best_uniform(rows):
        which = "other uniform" if same else "uniform"
        sentences.append(f"Best {which} format within the budget: {describe_rival(rival)}.")
    elif not same:
        sentences.append("No uniform format fits the budget.")
    for name, phrase in facts(plan, rows):
        if name in TOLD:
            sentences.append(f"{name[0].upper()}{name[1:]}: {phrase.removesuffix('.')}.")
    if plan.measured is None:
        sentences.append("Not measured yet: bitplan search also checks its plan on held-out text.")
    return [_unbroken(sentence) for sentence in sentences]


def _tiles(plan: Plan, rows: Sequence[Comparison]) -> list[tuple[str, str]]:
    """The numbers to remember, each with its meaning."""
    before, measured, rival = 2 * plan.weights, plan.measured, best_uniform(rows)
    tiles = [
        (f"{100 * plan.bytes / before:.1f} %", "of the size at 16 bits"),
        (f"{plan.bpw:.3f}", f"bits per weight, budget {plan.budget.text}"),
    ]
    if measured is not None:
        kl = with_error(measured.kl, measured.kl_stderr)
        tiles.append((kl, f"KL measured on {measured.tokens:,} tokens, nats per token"))
    predicted = with_error(plan.predicted_kl, plan.predicted_kl_stderr)
    tiles.append((predicted, "KL predicted, nats per token"))
    if rival is not None:
        ours, theirs, kind = plan.predicted_kl, rival.predicted_kl, ", predicted"
        if measured is not None and rival.kl is not None:
            ours, theirs, kind = measured.kl, rival.kl, ""
        if ours > 0:
            tiles.append((f"{theirs / ours:.2f} ×", f"this KL in the best uniform format{kind}"))
    if measured is not None and measured.ppl is not None:
        original = measured.ppl_original
        label = "perplexity" + (f", original {number(original)}" if original is not None else "")
        tiles.append((number(measured.ppl), label))
    return tiles


def _unbroken(text: str) -> str:
    """Keep a value together with its error and its percent sign."""
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def _comparison_cells(row: Comparison, own: bool) -> dict[str, Any]:
    ratio = "" if not row.kl else f"{row.predicted_kl / row.kl:.2f}"
    difference = ""
    if row.difference is not None:
        difference = with_error(row.difference, row.difference_stderr, sign=True)
    return {
        "name": row.name.removeprefix(UNIFORM),
        "own": own,
        "fits": row.fits,
        "predicted": [
            format_bytes(row.bytes),
            "" if math.isnan(row.bpw) else f"{row.bpw:.3f}",
            number(row.predicted_kl),
        ],
        "measured": [
            "" if row.kl is None else with_error(row.kl, row.kl_stderr),
            ratio,
            difference,
            "" if row.ppl is None else number(row.ppl),
        ],
    }


def _unit_cells(row: UnitRow) -> tuple[str, ...]:
    kl = "" if row.kl is None else with_error(row.kl, row.kl_stderr)
    return (row.name, row.shape, row.format, f"{row.bpw:.3f}", format_bytes(row.bytes), kl)


def _provenance(plan: Plan) -> dict[str, str]:
    """Where the numbers come from, as names and values."""
    values = {
        "Model": plan.model.id,
        "Model revision": plan.model.revision,
        "Model SHA-256": plan.model.sha256,
        "Metric": plan.metric,
        "Rounding": plan.rounding,
        "Solver": plan.solver,
        "Calibration": _pairs(plan.calibration),
        "Versions": _pairs(plan.versions),
        "Created": plan.created,
    }
    if (measured := plan.measured) is not None:
        values["Measured on"] = (
            f"{measured.text}, {measured.tokens:,} tokens in sequences of {measured.length}"
        )
        values["Measured text SHA-256"] = measured.text_sha256
    return {name: str(value) for name, value in values.items() if value is not None}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _frontier_alt(data: FrontierData) -> str:
    first, last = data.frontier.kl[0], data.frontier.kl[-1]
    best = data.plan_measured or data.plan
    return (
        f"KL in nats per token against stored size. Optimal plans fall from {number(first)} at "
        f"{data.frontier.bpw[0]:.2f} bits per weight to {number(last)} at "
        f"{data.frontier.bpw[-1]:.2f}. The plan has {best.bpw:.2f} bits per weight and KL "
        f"{with_error(best.kl, best.stderr)}."
    )


def _allocation_alt(grid: UnitGrid) -> str:
    widths = [float(value) for value in grid.values.flat if value > 0]
    widths += [unit.value for unit in grid.others]
    return f"Bits per weight of every unit, from {min(widths):.2f} to {max(widths):.2f}."


def _sensitivity_alt(data: SensitivityData) -> str:
    named = {unit.name: unit.value for unit in data.kl.others} | {
        f"{kind} in layer {layer}": float(data.kl.values[row, column])
        for row, kind in enumerate(data.kl.kinds)
        for column, layer in enumerate(data.kl.layers)
    }
    named = {name: value for name, value in named.items() if math.isfinite(value)}
    worst = max(named, key=lambda name: named[name])
    return (
        f"Predicted KL of every unit stored alone in {data.format}. The most sensitive is "
        f"{worst} with {number(named[worst])} nats per token."
    )

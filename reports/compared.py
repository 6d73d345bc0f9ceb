"""A comparison of two plans for people: in the terminal, as a page, as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm, to_hex
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._base.files import atomic_path
from ..models.wording import words_of
from ..quantizers.runtimes import Rules, StoredTensor
from ..search.budget import format_bytes
from ..search.coverage import planned_share
from ..search.plan import Plan
from .canvas import drawing
from .compare import Change, PlanDifference, Side
from .html import render
from .summary import optimality
from .words import number, short_names, with_error

SUFFIXES = (".html", ".png", ".svg")  # of what can be written
NAMED = 12  # changes that the terminal lists
MOST_ROWS = 2_000  # of the page's table of changes
MOST_BITS = 4  # difference in bits from which the colour is full
COLORS = "PuOr"  # fewer bits orange, more bits violet: told apart with every kind of colour vision


class Row(NamedTuple):
    """One property of the two plans; ``change`` is empty where there is nothing to subtract."""

    name: str
    first: str
    second: str
    change: str = ""


def rows(found: PlanDifference) -> Iterator[Row]:
    """The properties of both plans, those that are the same as well."""
    a, b = found.first.plan, found.second.plan
    x, y = found.first.size, found.second.size
    whole = [side.model_bytes for side in (found.first, found.second)]
    if any(whole):
        first, second = ("" if size is None else format_bytes(size) for size in whole)
        u, v = whole
        change = "" if u is None or v is None else bytes_change(v - u)
        yield Row("whole model", first, second, change)
    if a.coverage or b.coverage:
        yield Row("planned of it", _share(a), _share(b))
    yield Row("size", format_bytes(x), format_bytes(y), bytes_change(y - x))
    p, q = 8 * x / found.first.weights, 8 * y / found.second.weights
    yield Row("bits per weight", f"{p:.3f}", f"{q:.3f}", f"{q - p:+.3f}")
    if _storage(a) != _storage(b):
        first, second = (f"as {plan.runtime or 'bitplan'} stores it" for plan in (a, b))
        yield Row("bytes", first, second, "sizes are of different files")
    first, second = _edited(found.first), _edited(found.second)
    if first or second:
        why = "predicted and measured KL are of the plan before the change"
        yield Row("edited", first, second, why)
    if a.kv_cache or b.kv_cache:
        yield Row("KV cache", _cache(a), _cache(b))
    if a.assignments.keys() != b.assignments.keys():
        only = [len(x.assignments.keys() - y.assignments.keys()) for x, y in ((a, b), (b, a))]
        first, second = (f"{found.modules:,} and {count:,} only here" for count in only)
        yield Row("modules", first, second, "sizes are of different parts")
    yield Row("budget", a.budget.text, b.budget.text)
    yield Row(
        "KL predicted",
        _predicted(a),
        _predicted(b),
        "" if isnan(b.predicted_kl - a.predicted_kl) else _signed(b.predicted_kl - a.predicted_kl),
    )
    yield Row("KL measured", _measured(a), _measured(b), _measured_change(found))
    if any(m is not None and m.ppl is not None for m in (a.measured, b.measured)):
        yield Row("perplexity", _perplexity(a), _perplexity(b))
    yield Row("measured on", _text(a), _text(b), _text_change(found))
    yield Row("optimality", optimality(a), optimality(b))
    yield Row("formats", _formats(a), _formats(b))
    yield Row("metric", a.metric, b.metric)
    yield Row("solver", a.solver, b.solver)
    yield Row("rounding", a.rounding, b.rounding)


def _share(plan: Plan) -> str:
    return planned_share(plan.coverage) if plan.coverage else "not known"


class KindRow(NamedTuple):
    """What changed in the modules of one kind."""

    kind: str
    changed: int
    more: int
    fewer: int
    bytes: int | None
    kl: float | None


def kind_rows(found: PlanDifference) -> list[KindRow]:
    """Changes summed by kind of matrix, those that move the most bytes first."""
    kinds: dict[str, list[Change]] = {}
    for change in found.changes:
        kinds.setdefault(change.kind, []).append(change)
    result = [
        KindRow(
            kind,
            len(changes),
            sum(c.bits > 0 for c in changes),
            sum(c.bits < 0 for c in changes),
            _total([c.bytes for c in changes]),
            _total([c.kl for c in changes]),
        )
        for kind, changes in kinds.items()
    ]
    return sorted(result, key=lambda row: -abs(row.bytes or 0))


def print_comparison(console: Console, found: PlanDifference) -> None:
    """Print both plans and what changed between them."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column(Text(found.first.name), overflow="fold")
    table.add_column(Text(found.second.name), overflow="fold")
    table.add_column("change", overflow="fold")
    for row in rows(found):
        table.add_row(row.name, *(Text(cell) for cell in row[1:]))
    console.print(table)
    console.print(Text(f"\n{headline(found)}", style="bold"))
    if not found.changes:
        return
    kinds = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    kinds.add_column("kind", overflow="fold")
    for header in ("changed", "more bits", "fewer bits", "bytes", "predicted KL"):
        kinds.add_column(header, justify="right", no_wrap=True)
    for kind in kind_rows(found)[:NAMED]:
        counts = (f"{count:,}" for count in (kind.changed, kind.more, kind.fewer))
        kinds.add_row(Text(kind.kind), *counts, bytes_change(kind.bytes), _signed(kind.kl))
    console.print(kinds)
    largest = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    largest.add_column("largest changes", overflow="fold")
    largest.add_column("from", no_wrap=True)
    largest.add_column("to", no_wrap=True)
    largest.add_column("bytes", justify="right", no_wrap=True)
    largest.add_column("predicted KL", justify="right", no_wrap=True)
    for change in largest_changes(found)[:NAMED]:
        cells = (change.module, change.before, change.after)
        figures = bytes_change(change.bytes), _signed(change.kl)
        largest.add_row(*(Text(cell) for cell in (*cells, *figures)))
    console.print(largest)
    if len(found.changes) > NAMED:
        console.print(f"and {len(found.changes) - NAMED:,} more; --out compare.html lists them all")


def headline(found: PlanDifference) -> str:
    """How much changed, in a sentence."""
    if not found.changes:
        return f"Both plans give all {found.modules:,} modules the same format."
    more = sum(change.bits > 0 for change in found.changes)
    fewer = sum(change.bits < 0 for change in found.changes)
    others = len(found.changes) - more - fewer
    return (
        f"{len(found.changes):,} of {found.modules:,} modules change their format: {more:,} to "
        f"more bits, {fewer:,} to fewer, {others:,} to another format of as many."
    )


def largest_changes(found: PlanDifference) -> list[Change]:
    """By what they do to the predicted KL; without prices by bytes, then by bits."""
    return sorted(
        found.changes, key=lambda c: (-abs(c.kl or 0), -abs(c.bytes or 0), -abs(c.bits), c.module)
    )


class Cell(NamedTuple):
    """A matrix in the map of changes: what it says, its colours, and all of it in words."""

    text: str
    color: str
    ink: str
    words: str


def change_map(found: PlanDifference) -> tuple[list[int], dict[str, list[Cell | None]]]:
    """Changes by kind (rows) and layer (columns); None where nothing changed.

    Several changes in one place (experts) show their mean.

    Returns:
        The layers, and the cells of every kind.
    """
    table = found.first.table or found.second.table
    if table is None:
        return [], {}
    layers = sorted({unit.layer for unit in table.units if unit.layer is not None})
    kinds = dict.fromkeys(unit.kind for unit in table.units if unit.layer is not None)
    places: dict[tuple[str, int], list[Change]] = {}
    for change in found.changes:
        if change.layer is not None:
            places.setdefault((change.kind, change.layer), []).append(change)
    return layers, {
        kind: [_cell(places[kind, layer]) if (kind, layer) in places else None for layer in layers]
        for kind in kinds
    }


def _cell(changes: list[Change]) -> Cell:
    bits = float(np.mean([change.bits for change in changes]))
    color = matplotlib.colormaps[COLORS](_norm()(np.clip(bits, -MOST_BITS, MOST_BITS)))
    dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 0.5
    names = short_names([name for change in changes for name in (change.before, change.after)])
    words = "; ".join(f"{c.module}: {names[c.before]} → {names[c.after]}" for c in changes[:8])
    text = f"{bits:+.0f}" if bits else "±"
    return Cell(text, to_hex(color), "#ffffff" if dark else "#000000", words)


def _norm() -> TwoSlopeNorm:
    return TwoSlopeNorm(0, -MOST_BITS, MOST_BITS)


def write_comparison(found: PlanDifference, path: Path) -> list[Path]:
    """Write a comparison as a page (``.html``), or as a picture (``.png``: an SVG beside it).

    Returns:
        The files written.

    Raises:
        ValueError: If the name ends in neither, or there is nothing to draw.
    """
    if path.suffix == ".html":
        with atomic_path(path) as temporary:
            temporary.write_text(render_comparison(found), encoding="utf-8")
        return [path]
    if path.suffix in SUFFIXES:
        return _draw(found, path.with_suffix(".png"))
    raise ValueError(f"Cannot write {path}: give a name that ends in .html, .png or .svg.")


def render_comparison(found: PlanDifference) -> str:
    """The comparison as self-contained HTML."""
    layers, cells = change_map(found)
    return render(
        "compare.html",
        data={},
        scripts=(),
        title=f"{found.first.name} and {found.second.name}",
        model=found.first.plan.model.id,
        words=words_of(found.first.plan.calibration),
        headline=headline(found),
        first=found.first.name,
        second=found.second.name,
        rows=list(rows(found)),
        kinds=[
            (k.kind, k.changed, k.more, k.fewer, bytes_change(k.bytes), _signed(k.kl))
            for k in kind_rows(found)
        ],
        layers=layers,
        cells=cells,
        changes=[
            (c.module, c.before, c.after, bytes_change(c.bytes), _signed(c.kl))
            for c in largest_changes(found)[:MOST_ROWS]
        ],
        left_out=max(0, len(found.changes) - MOST_ROWS),
        paired=found.paired is not None,
    )


def _draw(found: PlanDifference, path: Path) -> list[Path]:
    layers, cells = change_map(found)
    if not layers:
        raise ValueError(
            "There is no map to draw: without a profile beside a plan nothing says which layer a "
            "module is in, or the model has no layers. Write --out compare.html instead."
        )
    places = {layer: i for i, layer in enumerate(layers)}
    kinds = {kind: i for i, kind in enumerate(cells)}
    sums, counts = np.zeros((len(kinds), len(layers))), np.zeros((len(kinds), len(layers)))
    for change in found.changes:
        if change.layer is not None:
            at = kinds[change.kind], places[change.layer]
            sums[at] += change.bits
            counts[at] += 1
    with drawing(path, height=1.3 + 0.36 * len(kinds)) as figure:
        axes = figure.add_subplot()
        axes.set_facecolor("#F2F2F2")
        values = np.ma.masked_where(counts == 0, sums / np.maximum(counts, 1))
        mesh = axes.pcolormesh(values, norm=_norm(), cmap=COLORS, edgecolors="white", linewidth=0.8)
        axes.set_yticks(np.arange(len(kinds)) + 0.5, list(kinds))
        step = max(1, round(len(layers) / 24))
        axes.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(x) for x in layers[::step]])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        axes.set_xlabel("layer")
        axes.set_title(f"Bits that {found.second.name} has more than {found.first.name}")
        bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=18, fraction=0.05)
        bar.outline.set_visible(False)
        bar.set_label("bits per code")
    return [path, path.with_suffix(".svg")]


def bytes_change(count: int | None) -> str:
    """``+1.2 MB``; empty if unknown."""
    if count is None:
        return ""
    return f"{'-' if count < 0 else '+' if count else '±'}{format_bytes(abs(count))}"


def _edited(side: Side) -> str:
    """That a plan was changed after it was made, where its byte count shows it; else empty."""
    if side.size == side.plan.bytes:
        return ""
    return (
        f"changed after it was made: it says {side.plan.bytes:,} B, but its assignments take "
        f"{side.size:,} B"
    )


def _storage(plan: Plan) -> tuple[StoredTensor, ...]:
    """What the plan's bytes are of; empty for bitplan's own layout."""
    return Rules.load(plan.runtime).storage if plan.runtime else ()


def _predicted(plan: Plan) -> str:
    if isnan(plan.predicted_kl):
        return "not predicted"
    return with_error(plan.predicted_kl, plan.predicted_kl_stderr)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{'+' if value > 0 else ''}{number(value)}"


def _total(values: list[Any]) -> Any:
    """The sum; None if a part is unknown."""
    return None if any(value is None for value in values) else sum(values)


def _measured(plan: Plan) -> str:
    if plan.measured is None:
        return "not measured"
    return with_error(plan.measured.kl, plan.measured.kl_stderr)


def _measured_change(found: PlanDifference) -> str:
    if found.paired is not None:
        return f"{with_error(*found.paired, sign=True)}, paired"
    a, b = found.first.plan.measured, found.second.plan.measured
    if a is None or b is None or not found.same_text:
        return ""
    return _signed(b.kl - a.kl)


def _perplexity(plan: Plan) -> str:
    ppl = plan.measured.ppl if plan.measured else None
    return "" if ppl is None else number(ppl)


def _text(plan: Plan) -> str:
    measured = plan.measured
    if measured is None:
        return ""
    return f"{measured.text}, {measured.tokens:,} {words_of(plan.calibration).many}"


def _text_change(found: PlanDifference) -> str:
    if found.first.plan.measured is None or found.second.plan.measured is None:
        return ""
    same = f"the same {words_of(found.first.plan.calibration).many}"
    return same if found.same_text else "not the same: not comparable"


def _formats(plan: Plan) -> str:
    counts = Counter(plan.assignments.values())
    shown = [f"{name} × {count}" for name, count in counts.most_common(3)]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _cache(plan: Plan) -> str:
    cache = plan.kv_cache
    if cache is None:
        return "not planned"
    widths = "/".join(str(bits) for bits in sorted(set(cache.bits.values())))
    return f"{widths} bits, {format_bytes(cache.bytes)}"

"""`bitplan frontier`: the plans of all budgets from a saved profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..jobs.limit_settings import FrontierSettings
from . import options
from .console import out
from .derive import Given, derived
from .lazy import verb

app = verb()


@app.command()
@derived
def frontier(
    *,
    path: options.ProfileArgument,
    asked: Given[FrontierSettings],
    frontier_file: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the whole frontier to this .json file."),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Budgets to print.")] = 15,
) -> None:
    """Print the plans from the smallest to the largest budget, next to the uniform ones.

    The limits are those of `bitplan solve` but for operations and time (--max-bops, --max-ms),
    which every budget has a plan of its own for: ask `bitplan solve` for one budget after another.
    """
    import numpy as np

    from ..search.coverage import coverage_of, describe_coverage
    from ..search.frontier import Frontier
    from ..search.limits import build_problem

    options.check_json(frontier_file, example="frontier.json")
    wanted = asked.build()
    limits = wanted.limits()
    table = limits.for_runtime(options.load_profile(path, wanted.runtime))
    model = table.provenance.model
    whole = Frontier.from_problem(build_problem(table, limits), model if model.sha256 else None)
    nats = table.provenance.words.nats
    shown = Table("plan", "bytes", "bpw", f"predicted KL ({nats})")
    rows = [(u.name, u.bytes, u.predicted_kl) for u in whole.uniform]
    picks = np.unique(np.linspace(0, len(whole.bytes) - 1, points).astype(int))
    rows += [("bitplan", int(whole.bytes[i]), float(whole.predicted_kl[i])) for i in picks]
    for name, size, kl in sorted(rows, key=lambda row: row[1]):
        shown.add_row(name, f"{size:,}", f"{8 * size / table.weights:.3f}", f"{kl:.4g}")
    out.print(shown)
    if found := coverage_of(table):
        out.print(f"Coverage: {describe_coverage(found)}", markup=False)
    if frontier_file is not None:
        whole.save(frontier_file)
        out.print(f"Frontier: {frontier_file}", markup=False)

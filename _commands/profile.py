"""`bitplan profile`: price every layer in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..jobs.settings import ProfileSettings
from . import options
from .console import hint, out
from .derive import Given, derived
from .lazy import verb

app = verb()


@app.command()
@derived
def profile(
    *,
    run: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder; default runs/MODEL.")
    ] = None,
    asked: Given[ProfileSettings],
    quiet: options.QuietOption = False,
) -> None:
    """Price every layer in every format and save the table; `bitplan solve` reads it."""
    from .._base.progress import Reporter
    from ..jobs.folder import RunFolder
    from ..jobs.search import run_profile
    from ..search.coverage import coverage_of, describe_coverage

    settings = options.profile_settings(asked)
    run = run or Path("runs") / options.run_name(settings.model)
    table = run_profile(settings, run, Reporter(quiet))
    nats = table.provenance.words.nats
    shown = Table("format", "bpw", f"predicted KL ({nats})", title="Uniform plans")
    for i, name in enumerate(table.formats):
        bpw = 8 * table.uniform_bytes(name) / table.weights
        shown.add_row(name, f"{bpw:.3f}", f"{table.kl[:, i].sum():.4g}")
    out.print(shown)
    if found := coverage_of(table):
        out.print(f"Coverage: {describe_coverage(found)}", markup=False)
    hint("Next:", "solve", RunFolder(run).profile, "--budget …")

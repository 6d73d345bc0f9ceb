"""Commands that show what a run found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import out

app = typer.Typer()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Draw a run's figures and report.html again."""
    from ..reports.html import write_report

    for path in write_report(run):
        out.print(str(path), markup=False)

"""`bitplan jobs`: the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import out
from .lazy import verb

app = verb()


@app.command()
def jobs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to look for runs.")
    ] = Path("runs"),
) -> None:
    """List the runs in a folder: what they do, how far they are, what they found."""
    from ..jobs.listing import list_jobs
    from ..reports.terminal import jobs_table

    if not folder.is_dir() and folder != Path("runs"):
        raise ValueError(f"There is no folder {folder}. Give the one that holds the runs.")
    found = list_jobs(folder)
    if not found:
        out.print(f"No runs in {folder}. `bitplan search` makes one.", markup=False)
        return
    out.print(jobs_table(found))

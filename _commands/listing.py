"""Commands that list what there is to choose from."""

from __future__ import annotations

import typer

from .console import out

app = typer.Typer()


@app.command()
def formats() -> None:
    """List the default candidate formats, and the families of all others with their grammar."""
    from ..reports.terminal import families_table, formats_table

    out.print(formats_table())
    out.print(families_table())
    out.print(
        "All of them, and keep, work with --formats. g is the number of weights per scale (c = one "
        "scale per output channel, t = one per tensor), -asym means a stored zero point, +lr a "
        "low-rank correction. keep is the checkpoint's own type.",
        markup=False,
    )


@app.command()
def metrics() -> None:
    """List the sensitivity metrics."""
    from ..reports.terminal import plugins_table
    from ..sensitivity.metrics import METRICS

    out.print(plugins_table(METRICS))


@app.command()
def solvers() -> None:
    """List the solvers: what each does and the paper it comes from."""
    from ..reports.terminal import plugins_table
    from ..search.solvers import SOLVERS

    out.print(plugins_table(SOLVERS))

"""`bitplan formats`: the default candidates and the grammar."""

from __future__ import annotations

from .console import out
from .lazy import verb

app = verb()


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

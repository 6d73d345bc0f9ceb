"""`bitplan solvers`: the solvers."""

from __future__ import annotations

from .console import out
from .lazy import verb

app = verb()


@app.command()
def solvers() -> None:
    """List the solvers: what each does and the paper it comes from."""
    from ..reports.terminal import plugins_table
    from ..search.solvers import SOLVERS

    out.print(plugins_table(SOLVERS))

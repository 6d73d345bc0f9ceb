"""`bitplan metrics`: the sensitivity metrics."""

from __future__ import annotations

from .console import out
from .lazy import verb

app = verb()


@app.command()
def metrics() -> None:
    """List the sensitivity metrics."""
    from ..reports.terminal import plugins_table
    from ..sensitivity.metrics import METRICS

    out.print(plugins_table(METRICS))

"""Commands that list what there is to choose from."""

from __future__ import annotations

import typer

from .console import out

app = typer.Typer()


@app.command()
def formats() -> None:
    """List the default candidate formats and the grammar of all others."""
    from ..reports.terminal import formats_table

    out.print(formats_table())
    from ..quantizers.format import BLOCKS

    out.print(
        "Any of int{1..8}-g{32|64|128|256|c|t}[-asym], bf16, fp16, fp32, keep works with "
        "--formats: bits, weights per scale (c = one per output channel, t = one per tensor), and "
        "-asym for a stored zero point. keep is the checkpoint's own type. llama.cpp has besides: "
        f"{', '.join(BLOCKS)}.",
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

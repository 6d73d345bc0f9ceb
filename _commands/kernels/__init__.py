"""`bitplan kernels`: the kernels that run packed weights."""

from __future__ import annotations

import typer

from ..lazy import group

app = typer.Typer(
    name="kernels",
    cls=group(__name__, ("check", "bench", "devices")),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def kernels() -> None:
    """Look at the kernels that run packed weights."""

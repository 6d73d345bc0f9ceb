"""The ``kernels`` group: what packed layers compute with."""

from __future__ import annotations

import typer

from . import bench

app = typer.Typer()
kernels = typer.Typer(no_args_is_help=True, help="Kernels of packed layers: measure and predict.")
kernels.add_typer(bench.app)
app.add_typer(kernels, name="kernels")

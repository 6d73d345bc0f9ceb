"""`bitplan import`: another tool's choice of bits as a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .console import hint, out
from .lazy import verb

app = verb()


@app.command(name="import")
def import_(
    path: Annotated[
        Path, typer.Argument(metavar="FILE|FOLDER", help="A GGUF file, or a quantized folder.")
    ],
    plan_file: Annotated[
        Path, typer.Option("--out", "-o", help="Write the plan to this .json file.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="The original model: needed to measure the plan, and to name modules."),
    ] = None,
    quiet: options.QuietOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Read another tool's choice of bits per layer as a plan, to measure and compare it."""
    from .._base.progress import Reporter
    from ..exporters.importing import import_plan

    options.check_json(plan_file)
    plan = import_plan(path, model, Reporter(quiet))
    plan.save(plan_file)
    out.print(f"{plan_file}: {len(plan.assignments):,} matrices, {plan.bpw:.3f} bpw", markup=False)
    if plan.note:
        out.print(f"Note: {plan.note}", markup=False)
    if model is not None:
        hint("Next:", "eval", plan_file)

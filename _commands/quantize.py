"""`bitplan quantize`: write packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .console import hint, out
from .lazy import verb

app = verb()


@app.command()
def quantize(
    plan: Annotated[Path, typer.Argument(metavar="PLAN|RUN", help="A plan.json, or its run.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    memory: options.MemoryOption = None,
    quiet: options.QuietOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Write the packed mixed-precision weights of a plan."""
    from .._base.progress import Reporter
    from ..jobs.folder import plan_path
    from ..jobs.materialize import quantize as write
    from ..jobs.settings import memory_bytes
    from ..quantizers.checkpoint import FILE_NAME, planned_bytes
    from ..search.budget import format_bytes
    from ..search.plan import Plan

    plan = plan_path(plan)
    room = None if memory is None else memory_bytes(memory)
    write(plan, folder, reporter=Reporter(quiet), memory=room)
    whole, planned = (folder / FILE_NAME).stat().st_size, planned_bytes(folder)
    out.print(
        f"{format_bytes(whole)}: {format_bytes(planned)} of planned weights, and "
        f"{format_bytes(whole - planned)} of other tensors and of the file's header"
    )
    source = Plan.load(plan)
    if source.bytes != planned:
        out.print(
            f"The plan says {format_bytes(source.bytes)} of planned weights: what "
            f"{source.runtime} stores, not this packing.",
            markup=False,
        )
    hint("Next:", "eval", folder)

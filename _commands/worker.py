"""`bitplan worker`: help with a search that runs elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .console import out
from .lazy import verb

app = verb()


@app.command()
def worker(
    storage: Annotated[
        str, typer.Option(help="Optuna storage URL that a search with tpe or nsga2 was given.")
    ],
    study: Annotated[
        str | None, typer.Option(help="Name of the study; needed if there are several.")
    ] = None,
    device: options.DeviceOption = "auto",
    quiet: options.QuietOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Help a search with tpe or nsga2 that runs elsewhere, until it is complete.

    The storage tells the worker everything: model, text, budget. A worker that is killed loses
    nothing: another one runs its trial again.
    """
    from .._base.progress import Reporter
    from ..jobs.worker import run_worker

    done = run_worker(storage, study, device, Reporter(quiet))
    out.print(f"The study is complete; this worker ran {done} of its trials.")

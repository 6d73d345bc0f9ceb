"""`bitplan report`: what a run found, as a page or in a browser."""

from __future__ import annotations

import shlex
import subprocess
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from .console import hint, out
from .lazy import verb

app = verb()
PORT = 8321


@app.command()
def report(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="A run folder; with --serve the folder that holds the runs, by default runs.",
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show all runs in a browser, those at work live.")
    ] = False,
    study: Annotated[
        bool,
        typer.Option("--study", help="Show the trials of a tpe or nsga2 run in optuna-dashboard."),
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port for --serve and --study; 0: any free one.")
    ] = PORT,
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page of --serve in a browser.")
    ] = True,
) -> None:
    """Draw a run's figures and report.html again, or show all runs in a browser.

    report.html needs no network and no server: open it from disk, mail it, print it.

    The pages of --serve can be reached from this machine only.
    """
    if serve and study:
        raise ValueError("--serve and --study are two different pages: give one of them.")
    if serve:
        _serve(run or Path("runs"), port, browser)
        return
    if run is None:
        raise ValueError("Which run? Give its folder, or --serve to see all runs in a browser.")
    if study:
        _study(run, port)
        return
    from ..reports.html import write_report

    for path in write_report(run):
        out.print(str(path), markup=False, soft_wrap=True)


def _serve(folder: Path, port: int, browser: bool) -> None:
    from ..reports.serve import make_server

    with make_server(folder, port) as server:
        address = f"http://{server.server_address[0]!s}:{server.server_address[1]}/"
        out.print(f"Runs of {folder}: {address} (Ctrl-C ends it)", markup=False, soft_wrap=True)
        if browser:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            out.print("Stopped.")


def _study(run: Path, port: int) -> None:
    from ..reports.study import dashboard_command, is_installed
    from ..search.blackbox.storage import shown

    command = dashboard_command(run, port or PORT)
    if not is_installed():
        out.print("The trials of this search can be seen in optuna-dashboard:")
        line = shlex.join([command[0], shown(command[1]), *command[2:]])
        out.print(f"pip install optuna-dashboard && {line}", markup=False, soft_wrap=True)
        return
    out.print(f"Trials: http://127.0.0.1:{port or PORT}/ (Ctrl-C ends it)", markup=False)
    code = subprocess.run(command, check=False).returncode
    if code:
        hint(
            f"{command[0]} ended with {code}. Is the port taken? Try",
            "report",
            run,
            "--study",
            "--port",
            port + 1,
        )

"""Command line: ``bitplan`` or ``python -m bitplan``."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from . import __version__
from ._commands.console import out
from ._commands.lazy import group

# Threads that wait by spinning make torch many times slower when other programs use the cores.
# Read when torch is loaded, so it is set before any command imports it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Large tensors on large pages: a profile takes a tenth less processor time, and memory as before.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_INTERRUPTED = 130  # exit code of Ctrl-C
_VERBS = (  # as --help lists them; each is a file in _commands
    *("search", "worker", "jobs", "profile", "solve", "frontier"),
    *("quantize", "eval", "generate", "export", "import", "exporters", "kernels"),
    *("report", "compare", "formats", "metrics", "solvers"),
)

app = typer.Typer(
    name="bitplan",
    cls=group(f"{__package__}._commands", _VERBS),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Decides how many bits each part of a neural network gets, and proves how close to "
    "optimal the answer is.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"bitplan {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    Console(stderr=True).print(f"Note: {message}", markup=False, style="yellow")


def main() -> None:
    """Entry point: bad input prints one clear message and exits with 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        _fail(str(error))
    except RuntimeError as error:
        if not ("can't allocate" in str(error) or "OutOfMemory" in type(error).__name__):
            raise
        _fail("Out of memory. Use fewer --batch-tokens, or a machine with more memory.")
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            Console(stderr=True).print(
                "Interrupted. Finished stages are kept: the same command goes on from there."
            )
        raise


def _fail(message: str) -> None:
    errors = Console(stderr=True)
    errors.print("[red]Error:[/] ", end="")
    # In a pipe or a log a path stays in one piece.
    errors.print(message, markup=False, highlight=False, soft_wrap=not errors.is_terminal)
    sys.exit(1)


if __name__ == "__main__":
    main()

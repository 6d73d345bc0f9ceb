"""Options and checks that several commands share and no settings declare."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..jobs.settings import (
    DEVICE_HELP,
    HELD_OUT_HELP,
    MEMORY_HELP,
    TRUST_HELP,
    ProfileSettings,
)
from .derive import Given

if TYPE_CHECKING:
    from ..sensitivity.table import SensitivityTable

DeviceOption = Annotated[str, typer.Option(help=DEVICE_HELP)]
TextOption = Annotated[str, typer.Option("--text", "--eval", help=HELD_OUT_HELP)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
MemoryOption = Annotated[str | None, typer.Option(help=MEMORY_HELP)]


def _trust(wanted: bool) -> None:
    if wanted:
        from ..models.trust import trust

        trust(True)


TrustOption = Annotated[bool, typer.Option("--trust-remote-code", callback=_trust, help=TRUST_HELP)]
ProfileArgument = Annotated[
    Path, typer.Argument(metavar="PROFILE|RUN", help="A profile.safetensors, or its run folder.")
]
PlanArgument = Annotated[
    Path,
    typer.Argument(metavar="PLAN|RUN|FOLDER", help="A plan.json, a run or a packed folder."),
]


def profile_settings(given: Given[ProfileSettings], runtime: str | None = None) -> ProfileSettings:
    """Settings of a profile; a runtime brings its own default formats."""
    if runtime is None or given["formats"]:
        return given.build()
    from ..quantizers.runtimes import Rules

    # bf16 for the layers a runtime leaves as they are, should it not take the model's own dtype.
    return given.build(formats=(*Rules.load(runtime).candidates, "bf16"))


def check_alone(context: typer.Context, option: str, *allowed: str) -> None:
    """Raise if other options were typed next to one that stands for all of them."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in (option, *allowed) and source and source.name == "COMMANDLINE":
            flag = parameter.opts[0] if parameter.opts[0].startswith("-") else name.upper()
            raise ValueError(
                f"--{option} goes on with the recorded settings: leave out {flag}, or give the "
                "whole command again with another --out."
            )


def command() -> str:
    """The command line, without the password a storage URL may hold."""
    words = [re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", word) for word in sys.argv[1:]]
    return shlex.join(["bitplan", *words])


def check_json(path: Path | None, option: str = "--out", example: str = "plan.json") -> None:
    """Raise, before anything is computed, if a file to write would not be JSON or writable."""
    from .._base.files import check_file

    if path is not None:
        check_file(path, (".json",), option, example)


def load_profile(path: Path, runtime: str | None) -> SensitivityTable:
    """The profile in a run folder or a file.

    Says if the run was for another runtime, and if the profile lacks formats that suit this one.
    """
    from ..jobs.folder import RunFolder
    from ..quantizers.runtimes import Rules
    from ..search.plan import Plan
    from ..sensitivity.table import SensitivityTable

    run = RunFolder(path)
    table = SensitivityTable.load(run.profile if path.is_dir() else path)
    before = Plan.load(run.plan).runtime if run.plan.is_file() else None
    if before not in (None, runtime):
        typer.echo(f"{path} was searched for {before}: --for {before} keeps to it.", err=True)
    if runtime is not None:
        wanted = set(Rules.load(runtime).candidates) - {"keep"}
        lacking = wanted - set(table.formats)
        if 2 * len(lacking) > len(wanted):
            typer.echo(
                f"The profile lacks {len(lacking)} of the {len(wanted)} formats that suit "
                f"{runtime}: a search or profile with --for {runtime} finds better plans.",
                err=True,
            )
    return table


def run_name(model: str) -> str:
    """A model's name as part of a folder's."""
    return Path(model).name.removesuffix(".gguf").replace(".py:", "-").replace(":", "-")

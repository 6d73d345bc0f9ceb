"""Commands that are files: each is loaded when it is asked for, and only then."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command


def verb() -> typer.Typer:
    """What a file defines its command on, as ``app``."""
    return typer.Typer(add_completion=False, rich_markup_mode="rich")


def group(package: str, verbs: Sequence[str]) -> type[TyperGroup]:
    """A group whose commands are the files of a package.

    Args:
        package: Its name.  The command ``solve`` is the file ``solve.py``; that of a keyword has
            an underscore more, as ``import_.py``.
        verbs: The commands, in the order of ``--help``.
    """

    class Verbs(TyperGroup):
        """Loads the file of a command when it is asked for."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.commands = dict.fromkeys(verbs)  # type: ignore[assignment]

        def list_commands(self, ctx: Any) -> list[str]:
            return list(verbs)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in verbs:
                return None
            file = cmd_name + "_" * iskeyword(cmd_name)
            return get_command(import_module(f"{package}.{file}").app)

    return Verbs

"""Every option that a message of the program names is one of its command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import typer.main

from bitplan.__main__ import app

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    *("_base", "_commands", "exporters", "jobs", "kernels", "models", "quantizers", "reports"),
    *("search", "sensitivity"),
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
# Options of other tools, which messages quote whole command lines of.
FOREIGN = {
    *("--pure", "--tensor-type-file", "--outtype", "--imatrix", "--dtype"),  # llama.cpp, vLLM
    *("--no-deps", "--force-reinstall"),  # pip
    *("--recipe", "--dump-resource-usage", "--host"),  # ExLlamaV3, cuobjdump, optuna-dashboard
}


def named() -> dict[str, set[str]]:
    """Option -> files whose strings name it; docstrings are no messages."""
    found: dict[str, set[str]] = {}
    for file in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        quiet = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in quiet:
                for option in OPTION.findall(node.value):  # type: ignore[attr-defined]
                    found.setdefault(option, set()).add(str(file.relative_to(ROOT)))
    return found


def known() -> set[str]:
    """All options of all commands."""
    options: set[str] = set()

    def add(command: Any, parent: Any) -> None:
        context = command.context_class(command, parent=parent)
        for parameter in command.get_params(context):
            options.update(parameter.opts, parameter.secondary_opts)
        for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
            add(command.get_command(context, name), context)

    add(typer.main.get_command(app), None)
    return options


def test_messages_name_options_that_exist() -> None:
    there, said = known(), named()
    assert {"--budget", "--exclude", "--trust-remote-code"} <= there & said.keys()
    unknown = {o: sorted(files) for o, files in said.items() if o not in there | FOREIGN}
    assert not unknown, unknown

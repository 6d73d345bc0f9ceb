"""Whether modelling code that comes with a checkpoint may run: only where the user said so."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from torch import nn

OPTION = "--trust-remote-code"
_PACKAGE = "transformers_modules"  # where transformers puts code of checkpoints
_state = {"trusted": False}  # of the process, since models are loaded in threads, too


@contextmanager
def trusting(wanted: bool = True) -> Iterator[None]:
    """Inside the block, checkpoints may run modelling code of their own.

    >>> with trusting():
    ...     is_trusted()
    True
    >>> is_trusted()
    False
    """
    before = _state["trusted"]
    _state["trusted"] = wanted
    try:
        yield
    finally:
        _state["trusted"] = before


def trust(wanted: bool) -> None:
    """The same from here on: what the option of a command does."""
    _state["trusted"] = _state["trusted"] or wanted


def allowed(asked: bool) -> AbstractContextManager[None]:
    """Trusting for a block, where a setting asks for it or it was said before."""
    return trusting(asked or is_trusted())


def is_trusted() -> bool:
    """Whether a checkpoint's own code may run; it is never asked for at the terminal."""
    return _state["trusted"]


def own_code(folder: Path) -> tuple[str, ...]:
    """The Python files that the config.json of a folder names as its modelling code, if any.

    A folder whose configuration names none has no code of its own, whatever files lie in it.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    named = config.get("auto_map") if isinstance(config, dict) else None
    if not isinstance(named, dict):
        return ()
    entries = [
        e for value in named.values() for e in (value if isinstance(value, list) else [value])
    ]
    return tuple(sorted({_file_of(str(entry)) for entry in entries if entry}))


def _file_of(entry: str) -> str:
    """The file that an entry of auto_map names, and the repository if it is another one."""
    repository, _, name = entry.rpartition("--")
    file = name.partition(".")[0] + ".py"
    return f"{file} of {repository}" if repository else file


def check_code(folder: Path) -> None:
    """Refuse a folder that takes modelling code of its own, which nobody trusted.

    Raises:
        ValueError: Names the files and the option.
    """
    files = own_code(folder)
    if files and not is_trusted() and not _is_known(folder):
        raise ValueError(untrusted(str(folder), files))


def untrusted(name: str, files: tuple[str, ...] = ()) -> str:
    """What to do about a model with code of its own."""
    named = f" ({', '.join(files)})" if files else ""
    return (
        f"{name} has modelling code of its own{named}, which runs with your rights. Read it, then "
        f"allow it with {OPTION} (in Python: with bitplan.trusting())."
    )


def code_sha256(folder: Path, module: nn.Module) -> str | None:
    """SHA-256 of the Python files in a folder whose own code a model runs; None for any other.

    Files of another repository count where they define the model's configuration or modules.
    """
    if not type(module).__module__.startswith(_PACKAGE):
        return None
    kinds = {type(part) for part in module.modules()} | {type(getattr(module, "config", None))}
    names = {kind.__module__ for kind in kinds if kind.__module__.startswith(_PACKAGE)}
    files = [*folder.glob("*.py"), *(Path(str(sys.modules[name].__file__)) for name in names)]
    digest = hashlib.sha256()
    for name, content in sorted({(file.name, file.read_bytes()) for file in files}):
        digest.update(f"{name}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _is_known(folder: Path) -> bool:
    """Whether transformers has a class of its own for the model."""
    from transformers import CONFIG_MAPPING

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("model_type") in CONFIG_MAPPING

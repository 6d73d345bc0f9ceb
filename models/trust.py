"""Whether modelling code that comes with a checkpoint may run: only where the user said so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

OPTION = "--trust-remote-code"
_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


@contextmanager
def trusting(wanted: bool = True) -> Iterator[None]:
    """Inside the block, checkpoints may run modelling code of their own.

    >>> with trusting():
    ...     is_trusted()
    True
    >>> is_trusted()
    False
    """
    token = _trusted.set(wanted)
    try:
        yield
    finally:
        _trusted.reset(token)


def trust(wanted: bool) -> None:
    """The same from here on: what the option of a command does."""
    if wanted:
        _trusted.set(True)


def is_trusted() -> bool:
    """Whether a checkpoint's own code may run; it is never asked for at the terminal."""
    return _trusted.get()


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
    files = {str(e).rpartition("--")[2].partition(".")[0] + ".py" for e in entries if e}
    return tuple(sorted(files))


def check_code(folder: Path) -> None:
    """Refuse a folder with modelling code of its own that nobody trusted.

    Raises:
        ValueError: Names the files and the option.
    """
    files = own_code(folder)
    if files and not is_trusted():
        raise ValueError(
            f"{folder} has modelling code of its own ({', '.join(files)}), which runs with your "
            f"rights. Read it, then allow it with {OPTION} (in Python: bitplan.trusting())."
        )


def code_sha256(folder: Path) -> str | None:
    """SHA-256 of the Python files of a folder with modelling code of its own; None without any."""
    if not own_code(folder):
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(f"{file.name}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()

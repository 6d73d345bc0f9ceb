"""Where commands print, and how they name the next one."""

from __future__ import annotations

import shlex

from rich.console import Console

out = Console()


def hint(text: str, *command: object) -> None:
    """Print a command that can be pasted."""
    words = [part if part == "--budget …" else shlex.quote(str(part)) for part in command]
    out.print(f"{text} bitplan {' '.join(map(str, words))}", markup=False, soft_wrap=True)

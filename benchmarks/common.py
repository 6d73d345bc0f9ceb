"""What every benchmark shares: where and with what it ran, and files that say so."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitplan._base.files import atomic_path, write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("bitplan", "torch", "transformers", "numpy", "scipy", "pulp", "optuna", "matplotlib")

Row = Mapping[str, Any]


def write_results(
    name: str,
    title: str,
    *,
    rows: Sequence[Row] = (),
    tables: Mapping[str, Sequence[Row]] | None = None,
    figures: Row | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
    made: Row | None = None,
    out: Path = RESULTS,
) -> None:
    """Write ``NAME.json`` and a readable ``NAME.md`` with the same numbers and their origin.

    Args:
        name: File name without suffix, such as ``solvers``.
        title: Heading of the Markdown file.
        rows: The table; all rows have the keys of the first, units spelled in the keys
            (``certified_s``, ``peak_mb``).
        tables: Further tables by heading.
        figures: Single numbers outside the table, by name.
        notes: Sentences below the table: what was measured and how.
        command: What reproduces the file; by default this process's own command line.
        made: What :func:`origin` was where the figures were made; by default it is here and now.
        out: Folder to write to.
    """
    result = {
        "name": name,
        "title": title,
        "command": command or this_command(),
        **(origin() if made is None else made),
        "figures": dict(figures or {}),
        "rows": [dict(row) for row in rows],
        "tables": {heading: [dict(row) for row in rs] for heading, rs in (tables or {}).items()},
        "notes": list(notes),
    }
    write_json(out / f"{name}.json", result)
    with atomic_path(out / f"{name}.md") as temporary:
        temporary.write_text(_markdown(result))


def origin() -> dict[str, Any]:
    """Machine, versions and commit; nothing that names a host, a user or a path."""
    return {
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": _commit(),
    }


def this_command() -> str:
    """The command line of this process, from the repository's root."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return shlex.join(["python", script, *sys.argv[1:]])


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of this checkout, ``-dirty`` if files differ; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def _markdown(result: Mapping[str, Any]) -> str:
    lines = [f"# {result['title']}", ""]
    lines += _table(result["rows"])
    for heading, rows in result["tables"].items():
        lines += [f"## {heading}", "", *_table(rows)]
    if result["figures"]:
        lines += [f"- {key}: {_cell(value)}" for key, value in result["figures"].items()] + [""]
    for note in result["notes"]:
        lines += [note, ""]
    machine, versions = result["machine"], result["versions"]
    lines += [
        f"Made by `{result['command']}` on {machine['cores']} cores of {machine['cpu']} "
        f"({machine['system']}), commit {result['commit'] or 'none'}; "
        + ", ".join(f"{package} {number}" for package, number in versions.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    keys = list(rows[0])
    lines = [_line(keys), _line(["---"] * len(keys))]
    return [*lines, *(_line([_cell(row[key]) for key in keys]) for row in rows), ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)

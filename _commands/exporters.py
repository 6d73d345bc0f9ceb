"""`bitplan exporters`: the targets of an export."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .console import out
from .lazy import verb

app = verb()


@app.command()
def exporters() -> None:
    """List the targets: what they are for, what they write, and what to install to run it."""
    from ..exporters.targets import EXPORTERS, shown_name
    from ..reports.words import plain

    shown = Table(
        "--to", "what", "writes", "plan", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    runtimes, tools, here = [], [], []
    known = [shown_name(key) for key in EXPORTERS.names()]
    for key in EXPORTERS.names():
        exporter, name = EXPORTERS.get(key)(), shown_name(key)
        what = plain((exporter.__doc__ or "").split("\n")[0])
        form = exporter.suffix or exporter.form or ""
        shown.add_row(name, escape(what), form, exporter.config_suffix or "")
        others = [runtime for runtime in exporter.runtimes if runtime not in known]
        if others:
            runtimes.append(f"{', '.join(others)} ({name})")
        if exporter.extra:
            tools.append(exporter.extra)
            here += [name] * exporter.installed()
    out.print(shown)
    out.print(f"\n--to also takes what reads the files: {'; '.join(runtimes)}.", markup=False)
    out.print(
        f"--verify runs the tool, which pip install 'bitplan[NAME]' adds for {', '.join(tools)}. "
        f"Installed here: {', '.join(here) or 'none'}.",
        markup=False,
    )

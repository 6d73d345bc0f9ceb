"""A plan in the terminal: what it is, how it compares, where its files are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..search.budget import format_bytes
from ..search.plan import Plan
from .summary import comparison, facts
from .words import UNIFORM, number, with_error


def print_summary(console: Console, plan: Plan, files: Mapping[str, Path]) -> None:
    """Print a plan's size, KL, optimality and rivals, and where its files are.

    Args:
        console: Where to print.
        plan: The plan.
        files: What was written, by name.
    """
    table = Table(
        title=Text(f"Plan for {plan.model.id}", style="bold"),
        title_justify="left",
        box=box.SIMPLE,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, phrase in facts(plan, comparison(plan)):
        table.add_row(name, Text(phrase))
    folders: dict[Path, list[str]] = {}
    for path in files.values():
        folders.setdefault(path.parent, []).append(path.name)
    for folder, names in folders.items():
        table.add_row("files", Text(f"{folder}/  {'  '.join(names)}"))
    console.print(table)
    if plan.baselines:
        console.print(uniform_table(plan))


def uniform_table(plan: Plan) -> Table:
    """The plan and every baseline measured on the same tokens, by size.

    KL is in nats per token; ``difference`` is the KL above the plan's, paired over sequences.
    """
    table = Table(
        title=Text("Measured on the same tokens", style="bold"),
        title_justify="left",
        caption=Text("KL in nats per token; difference to this plan is paired over sequences"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # the box puts one space between columns: all seven fit 80 characters
    )
    table.add_column("plan", overflow="fold", min_width=len("int4-g128-asym"))
    for header in ("size", "bpw", "predicted", "KL", "difference", "ppl"):
        table.add_column(header, justify="right", no_wrap=True)
    own, *rivals = comparison(plan)
    for row in sorted([own, *rivals], key=lambda row: row.bytes):
        difference = ""
        if row.difference is not None:
            difference = with_error(row.difference, row.difference_stderr, sign=True)
        table.add_row(
            Text(row.name.removeprefix(UNIFORM)),
            format_bytes(row.bytes),
            f"{row.bpw:.2f}",
            number(row.predicted_kl),
            "" if row.kl is None else with_error(row.kl, row.kl_stderr),
            difference,
            "" if row.ppl is None else number(row.ppl),
            style="bold green" if row is own else "" if row.fits else "dim",
        )
    return table

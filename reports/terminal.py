"""A plan in the terminal: what it is, how it compares, where its files are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .._base.progress import clock
from .._base.registry import Registry
from ..jobs.listing import JobInfo
from ..models.wording import words_of
from ..quantizers.candidates import DEFAULT_FORMATS
from ..quantizers.format import FAMILIES, Format
from ..search.budget import format_bytes
from ..search.plan import Plan
from .summary import comparison, facts, measured_on
from .words import number, plain, with_error


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

    KL is in nats per token or sample; ``difference`` is the KL above the plan's, paired over
    sequences.  Bits per weight are left out where sizes hold more than weights.
    """
    words = words_of(plan.calibration)
    title = f"Measured on the same {words.many}" + (", with KV cache" if plan.kv_cache else "")
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=Text(f"KL in {words.nats}; difference to this plan is paired over {words.drawn}"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # the box puts one space between columns: all seven fit 80 characters
    )
    table.add_column("plan", overflow="fold", min_width=len("int4-g128-asym"))
    headers = ["size", "bpw", "predicted", "KL", "difference", "ppl"]
    own, *rivals = comparison(plan)
    if plan.kv_cache:
        headers.remove("bpw")
    if own.ppl is None:
        headers.remove("ppl")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in sorted([own, *rivals], key=lambda row: row.bytes):
        cells = {
            "size": format_bytes(row.bytes),
            "bpw": f"{row.bpw:.2f}",
            "predicted": number(row.predicted_kl),
            "KL": "" if row.kl is None else with_error(row.kl, row.kl_stderr),
            "difference": ""
            if row.difference is None
            else with_error(row.difference, row.difference_stderr, sign=True),
            "ppl": "" if row.ppl is None else number(row.ppl),
        }
        notes = (row.misfit, measured_on(row, words.many))
        table.add_row(
            Text("\n".join([row.label, *(f"({note})" for note in notes if note)])),
            *(cells[header] for header in headers),
            style="bold green" if row is own else "" if row.fits else "dim",
        )
    return table


def jobs_table(jobs: Sequence[JobInfo]) -> Table:
    """One line per run: how far it is, or what its plan is; KL in nats per token, measured."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=20)
    table.add_column("status", no_wrap=True)
    errors = any(job.error for job in jobs)  # the only long texts here
    table.add_column("progress, or the plan", no_wrap=not errors, min_width=20)
    for job in jobs:
        style = {"done": "green", "failed": "red"}.get(job.status, "yellow")
        about = _plan_of(job) if job.status == "done" else _progress_of(job)
        table.add_row(Text(str(job.folder)), Text(job.status, style=style), Text(about))
    return table


def _progress_of(job: JobInfo) -> str:
    """``Profiling (fisher) 32/96, 0:40 left``, or what it failed with."""
    text = job.doing or job.stage or ""
    if job.total:
        text += f" {job.done}/{job.total}"
    if job.status == "running" and job.eta is not None:
        text += f", {clock(job.eta)} left"
    if job.error:
        text = f"{text}: {job.error}" if text else job.error
    return text


def _plan_of(job: JobInfo) -> str:
    """``4.3bpw: 4.300 bpw, KL 0.180``; empty for a job that makes none."""
    if job.bpw is None:
        return ""
    kl = "" if job.kl is None else f", KL {number(job.kl)}"
    return f"{job.budget}: {job.bpw:.3f} bpw{kl}"


def formats_table() -> Table:
    """The default candidate formats and what they store."""
    table = Table("format", "bits per weight", title="Default candidates")
    for name in DEFAULT_FORMATS:
        size = Format.parse(name).stored_bytes((4096, 4096))
        table.add_row(name, f"{8 * size / 4096**2:.4f}")
    return table


def families_table() -> Table:
    """The families of formats: what their names look like, what they are, and where from."""
    table = Table("name", "formats", "what they are", "from", box=box.SIMPLE_HEAD)
    table.columns[1].overflow = "fold"  # a cut name is no name
    for name in FAMILIES.names():
        kind = FAMILIES.get(name)
        text = FAMILIES.docstring(name)
        what = plain(text.partition("\n")[0])
        table.add_row(
            name, escape(kind.grammar), escape(what), escape(plain(_first_reference(text)))
        )
    return table


def plugins_table(registry: Registry[Any]) -> Table:
    """Every plugin with the first line of its docstring and the first of its references."""
    table = Table("name", "what it does", "from", box=box.SIMPLE_HEAD)
    for name in registry.names():
        text = registry.docstring(name)
        what = plain(text.partition("\n")[0])
        table.add_row(name, escape(what), escape(plain(_first_reference(text))))
    return table


def _first_reference(docstring: str) -> str:
    """Authors and year, or the name, that the References section begins with."""
    _, found, references = docstring.partition("References:\n")
    if not found:
        return ""
    first = " ".join(references.split("\n\n")[0].split())
    dated = re.match(r"[^;:]*?\((?:19|20)\d\d\)", first)
    return dated[0] if dated else re.split(r"[,;.]\s", first)[0]

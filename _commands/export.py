"""`bitplan export`: a plan's weights, or the plan itself, for another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from . import options
from .console import out
from .lazy import verb

if TYPE_CHECKING:
    from ..exporters.export import Exported
    from ..exporters.verify import Comparison

app = verb()

_TARGET = typer.Option("--to", help="Target; see `bitplan exporters`. A runtime's name works too.")


@app.command()
def export(
    plan: options.PlanArgument,
    target: Annotated[str, _TARGET],
    path: Annotated[Path, typer.Option("--out", "-o", help="File or folder to write.")],
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan-only",
            help="Write the tool's own configuration, and no weights: only the model's layers are "
            "read (of a file.py:function, the whole model).",
        ),
    ] = False,
    snap: Annotated[
        bool,
        typer.Option(
            "--snap", help="Round formats that the target lacks up to the next that it has."
        ),
    ] = False,
    runtime: Annotated[
        str | None,
        typer.Option("--for", help="Runtime to check for, of those that read these files."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="A GGUF file of the same model, for the metadata a folder lacks."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--verify", help="Load the result with the foreign tool and compare logits."),
    ] = False,
    text: options.TextOption = "builtin",
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", "--eval-tokens", min=2, help="With --verify: tokens to compare on."
        ),
    ] = 512,
    python: Annotated[
        str | None,
        typer.Option(help="Interpreter of another environment that has the foreign tool."),
    ] = None,
    quiet: options.QuietOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Write a plan's weights, or the plan itself, in the form of another tool.

    The plan is checked before anything is written: a unit that the target cannot run is named, with
    the rule and what to do. Where the run's profile lies beside the plan, this comes before the
    model is loaded. The codes and scales are those the plan was priced with; the tool
    never quantizes again. A plan alone is written without loading weights; imatrix runs the model
    on the plan's calibration text.
    """
    from .._base.progress import Reporter
    from ..exporters.export import export as write
    from ..exporters.targets import find
    from ..exporters.verify import verify, weight_error
    from ..search.budget import format_bytes

    if check and (plan_only or not find(target)[1].weights):
        raise ValueError(
            f"--verify compares weights, and {target} gets none here. Leave out --verify"
            + (" or --plan-only." if plan_only and find(target)[1].weights else ".")
        )
    done = write(
        plan,
        target,
        path,
        plan_only=plan_only,
        round_up=snap,
        runtime=runtime,
        like=like,
        reporter=Reporter(quiet),
    )
    for name, fmt in list(done.changed.items())[:10]:
        out.print(f"Rounded up: {name} to {fmt}", markup=False)
    if len(done.changed) > 10:
        out.print(f"Rounded up: {len(done.changed) - 10:,} more")
    whole = format_bytes(done.size)
    if done.stored is None:
        out.print(f"{done.path}: {whole}", markup=False, soft_wrap=True)
    else:
        out.print(
            f"{done.path}: {whole}, of which {format_bytes(done.stored)} of planned weights. Read "
            "back: every matrix has the plan's format.",
            markup=False,
        )
        if note := _other_bytes(done):
            out.print(note, markup=False)
    if usage := done.usage:
        out.print(f"Use it: {usage}", markup=False, soft_wrap=True)
    if check:
        if done.stored is not None:
            error = weight_error(find(done.target)[1], done.source, done.path)
            same = "are ours, bit for bit" if error == 0 else f"differ from ours by {error:.1g}"
            out.print(f"Weights read back {same}.")
        comparison = verify(done, text, tokens, python)
        out.print(_comparison_table(done, comparison))
        if not comparison.agrees:
            raise ValueError(
                f"{done.path} does not compute what the plan does: KL {comparison.kl:.2g} is above "
                f"{comparison.max_kl:.2g}, the most that the arithmetic of {done.target} explains."
            )


def _other_bytes(done: Exported) -> str:
    """How far the bytes in the file are from those that the plan counts; empty if they agree."""
    plan, rules, stored = done.source.plan, done.rules, done.stored
    if rules is None or stored is None or stored == plan.bytes:
        return ""
    more = stored - plan.bytes
    return (
        f"That is {abs(more):,} B ({abs(more) / plan.bytes:.2%}) {'more' if more > 0 else 'less'} "
        f"than the plan's {plan.bytes:,} B, which are what {plan.runtime or 'bitplan itself'} "
        f"stores. A plan made with --for {rules.name} counts what {rules.name} stores."
    )


def _comparison_table(done: Exported, comparison: Comparison) -> Table:
    from ..models.wording import words_of

    words = words_of(done.source.plan.calibration)
    shown = Table("", "value", title=f"{done.target} against our dequantized model")
    shown.add_row("KL", f"{comparison.kl:.3g} {words.nats} (at most {comparison.max_kl:.1g})")
    shown.add_row("largest |Δ log p|, p > 1e-4", f"{comparison.max_error:.3g}")
    shown.add_row("relative error of logits", f"{comparison.relative:.3g}")
    same = "same likeliest " + ("token" if words.one == "token" else "class")
    shown.add_row(same, f"{comparison.top1:.2%}")
    skipped = f", {comparison.skipped:,} skipped" if comparison.skipped else ""
    shown.add_row(words.many, f"{comparison.tokens:,}{skipped}")
    if comparison.skipped:
        shown.add_row("skipped", "the tool gave no distribution: parts of letters")
    return shown

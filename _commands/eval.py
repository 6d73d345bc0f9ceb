"""`bitplan eval`: measure a plan or packed weights."""

from __future__ import annotations

from math import isnan
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from . import options
from .console import out
from .lazy import verb

app = verb()


@app.command(name="eval")
def evaluate(
    target: options.PlanArgument,
    text: options.TextOption = "builtin",
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            "--eval-tokens",
            min=2,
            help="Held-out tokens to measure on; by default as many as the plan was, else 16384.",
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    quiet: options.QuietOption = False,
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Measure KL divergence and perplexity of a plan or a packed folder against the original."""
    from .._base.progress import Reporter
    from ..jobs.held_out import run_eval
    from ..models.wording import words_of

    plan, result, ppl_original = run_eval(target, text, tokens, device, Reporter(quiet))
    words = words_of(plan.calibration)
    shown = Table("", "value", title=escape(str(target)))
    shown.add_row("measured KL", f"{result.mean_kl:.6g} ± {result.kl_stderr:.2g} {words.nats}")
    if not isnan(plan.predicted_kl):
        shown.add_row("predicted KL", f"{plan.predicted_kl:.6g} ± {plan.predicted_kl_stderr:.2g}")
    if (before := plan.measured) is not None:
        recorded = f"{before.kl:.6g} ({before.tokens:,} {words.many} of {before.text})"
        shown.add_row("KL recorded in the plan", escape(recorded))
    if result.perplexity is not None:
        shown.add_row("perplexity", f"{result.perplexity:.4f} (original {ppl_original:.4f})")
    shown.add_row(words.many, f"{result.tokens:,}")
    out.print(shown)

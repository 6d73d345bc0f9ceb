"""Commands on packed weights: write, measure, generate."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import options
from .console import hint, out

app = typer.Typer()


@app.command()
def quantize(
    plan: Annotated[Path, typer.Argument(metavar="PLAN|RUN", help="A plan.json, or its run.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    quiet: options.QuietOption = False,
) -> None:
    """Write the packed mixed-precision weights of a plan."""
    from .._base.progress import Reporter
    from ..jobs.folder import plan_path
    from ..jobs.materialize import quantize as write
    from ..quantizers.checkpoint import FILE_NAME, planned_bytes
    from ..search.budget import format_bytes
    from ..search.plan import Plan

    plan = plan_path(plan)
    write(plan, folder, reporter=Reporter(quiet))
    whole, planned = (folder / FILE_NAME).stat().st_size, planned_bytes(folder)
    out.print(
        f"{format_bytes(whole)}: {format_bytes(planned)} of planned weights, and "
        f"{format_bytes(whole - planned)} that the plan leaves as it was"
    )
    source = Plan.load(plan)
    if source.bytes != planned:
        out.print(
            f"The plan says {format_bytes(source.bytes)} of planned weights: what "
            f"{source.runtime} stores, not this packing.",
            markup=False,
        )
    hint("Next:", "eval", folder)


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


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A packed folder.")],
    prompt: Annotated[
        str, typer.Option(help="What the model continues.")
    ] = "The capital of France is",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    device: options.DeviceOption = "auto",
) -> None:
    """Generate text with a packed model (greedy), token by token as it comes."""
    from ..jobs.materialize import load_packed
    from .streaming import TimedStreamer

    if not prompt:
        raise ValueError("The prompt is empty. Give the model something to continue.")
    model = load_packed(folder, device)
    tokenizer = model.workload.tokenizer
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer, so it cannot generate text.")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    streamer = TimedStreamer(tokenizer)
    model.module.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=max_tokens, do_sample=False, streamer=streamer
    )
    Console(stderr=True).print(streamer.summary(), style="dim", highlight=False)

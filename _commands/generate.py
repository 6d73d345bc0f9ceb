"""`bitplan generate`: text from packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import options
from .lazy import verb

app = verb()


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A packed folder.")],
    prompt: Annotated[
        str, typer.Option(help="What the model continues.")
    ] = "The capital of France is",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    device: options.DeviceOption = "auto",
    trust_remote_code: options.TrustOption = False,
) -> None:
    """Generate text with a packed model (greedy), token by token as it comes."""
    from ..jobs.materialize import load_packed
    from ..models.vocabulary import check_tokens
    from .streaming import TimedStreamer

    if not prompt:
        raise ValueError("The prompt is empty. Give the model something to continue.")
    model = load_packed(folder, device)
    tokenizer = model.workload.tokenizer
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer, so it cannot generate text.")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    check_tokens(model, inputs["input_ids"].flatten().tolist(), "--prompt")
    streamer = TimedStreamer(tokenizer)
    model.module.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=max_tokens, do_sample=False, streamer=streamer
    )
    Console(stderr=True).print(streamer.summary(), style="dim", highlight=False)

"""`bitplan formats`: the default candidates and the grammar."""

from __future__ import annotations

from .console import out
from .lazy import verb

app = verb()


@app.command()
def formats() -> None:
    """List the default candidate formats and the grammar of all others."""
    from ..reports.terminal import formats_table

    out.print(formats_table())
    from ..quantizers.format import BLOCKS

    out.print(
        "Any of int{1..8}-g{32|64|128|256|c|t}[-asym], bf16, fp16, fp32, keep works with "
        "--formats: bits, weights per scale (c = one per output channel, t = one per tensor), and "
        "-asym for a stored zero point. keep is the checkpoint's own type. llama.cpp has besides: "
        f"{', '.join(BLOCKS)}.",
        markup=False,
    )

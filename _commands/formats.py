"""`bitplan formats`: the menus, the grammar, and what formats lose."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from .console import out
from .lazy import verb

app = verb()


@app.command()
def formats(
    shape: Annotated[
        str | None,
        typer.Option(
            help="Rows and columns of a matrix, such as 4096x4096: what formats take of it, lose "
            "of normal weights, and what runs them; under a minute.",
        ),
    ] = None,
) -> None:
    """List the default candidate formats, and the families of all others with their grammar."""
    if shape is not None:
        from ..reports.format_menu import facts_table

        out.print(facts_table(_shape(shape)))
        out.print(
            "The error is relative to the weights' squares; no code of b bits has less than the "
            "bound 4^-b. 'fused' kernels read the codes where they multiply; 'decoded' weights are "
            "made plain before the product. Runtimes are those whose rules take the format.",
            markup=False,
        )
        return
    from ..reports.terminal import families_table, formats_table

    out.print(formats_table())
    out.print(families_table())
    out.print(
        "All of them, and keep, work with --formats. g is the number of weights per scale (c = one "
        "scale per output channel, t = one per tensor), -asym means a stored zero point, +lr a "
        "low-rank correction. keep is the checkpoint's own type. --formats also takes menus: "
        "default, int (integers alone), all (with nl, vq and tcq), or a runtime's name.",
        markup=False,
    )


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if match is None:
        raise ValueError(f"--shape is {text!r}: write rows x columns, for example 4096x4096.")
    return int(match[1]), int(match[2])

"""`bitplan compare`: two plans of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import out
from .lazy import verb

app = verb()


@app.command()
def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="A plan.json, a run or a packed folder.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The one to compare it with.")],
    file: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Also write a page (.html) or a map of the changes (.png, .svg)."
        ),
    ] = None,
) -> None:
    """Compare two plans of one model: what changed, in bytes, predicted and measured KL.

    Changes are B minus A. Measured KL is paired where both runs kept figures of the same text.
    """
    from .._base.files import check_file
    from ..reports.compare import compare as compare_plans
    from ..reports.compared import SUFFIXES, print_comparison, write_comparison

    if file is not None:
        check_file(file, SUFFIXES, "--out", "compare.html")
    found = compare_plans(first, second)
    print_comparison(out, found)
    if file is not None:
        for path in write_comparison(found, file):
            out.print(str(path), markup=False, soft_wrap=True)

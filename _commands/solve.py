"""`bitplan solve`: a plan from a saved profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..jobs.limit_settings import SolveSettings
from . import options
from .console import out
from .derive import Given, derived
from .lazy import verb

app = verb()


@app.command()
@derived
def solve(
    *,
    path: options.ProfileArgument,
    asked: Given[SolveSettings],
    plan_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan to this .json file.")
    ] = None,
    program: Annotated[
        Path | None,
        typer.Option(help="Also write the integer program, as .lp or .mps, for any other solver."),
    ] = None,
) -> None:
    """Answer a what-if in a moment: another budget, limits or formats from a saved profile."""
    from .._base.files import check_file
    from ..reports.terminal import print_summary
    from ..search.budget import Budget
    from ..search.solve import solve as run_solver
    from ..search.solve import write_program

    options.check_json(plan_file)
    if program is not None:
        check_file(program, (".lp", ".mps"), "--program", "plan.lp")
    wanted = asked.build()
    limits = wanted.limits()
    if program is not None and wanted.fastest:
        raise ValueError("--program writes what --budget asks for, not --fastest.")
    any_size = wanted.fastest and wanted.budget is None
    budget = None if any_size else Budget.parse(wanted.budget or "4.3bpw")
    table = options.load_profile(path, wanted.runtime)
    plan = run_solver(
        table,
        budget,
        solver=wanted.solver if wanted.max_kl is None else "bisection",
        limits=limits,
        max_kl=wanted.max_kl,
        fastest=wanted.fastest,
        seed=wanted.seed,
        command=options.command(),
    )
    files = {}
    if program is not None and budget is not None:
        write_program(table, budget, limits, program)
        files["program"] = program
    if plan_file is not None:
        plan.save(plan_file)
        files["plan"] = plan_file
    print_summary(out, plan, files)
    if plan_file is None:
        out.print("Not saved; add --out plan.json to quantize or evaluate this plan.")

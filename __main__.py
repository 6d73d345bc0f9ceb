"""Command line: ``bitplan`` or ``python -m bitplan``."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import __version__
from ._commands import exporting, kernels, listing, options, packed, reporting
from ._commands.console import hint, out

# Threads that wait by spinning make torch many times slower when other programs use the cores.
# Read when torch is loaded, so it is set before any command imports it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_INTERRUPTED = 130  # exit code of Ctrl-C

app = typer.Typer(
    name="bitplan",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Decides how many bits each part of a neural network gets, and proves how close to "
    "optimal the answer is.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"bitplan {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def search(
    context_: typer.Context,
    model: options.ModelArgument = "smollm2",
    budget: options.SearchBudgetOption = None,
    vram: options.VramOption = None,
    max_kl: options.MaxKlOption = None,
    max_ppl: options.MaxPplOption = None,
    fastest: options.FastestOption = False,
    context: options.ContextOption = 4096,
    batch: options.BatchOption = 1,
    run: options.OutRunOption = None,
    resume: options.ResumeOption = None,
    formats: options.FormatsOption = None,
    metric: options.MetricOption = "fisher",
    rounding: options.RoundingOption = "rtn",
    calibration: options.CalibrationOption = "builtin",
    sequences: options.SequencesOption = 96,
    length: options.LengthOption = 128,
    batch_tokens: options.BatchTokensOption = 768,
    evaluation: options.EvalTextOption = "builtin",
    eval_tokens: options.EvalTokensOption = 16384,
    include: options.IncludeOption = None,
    exclude: options.ExcludeOption = None,
    group: options.GroupOption = None,
    pin: options.PinOption = None,
    ban: options.BanOption = None,
    at_least: options.AtLeastOption = None,
    at_most: options.AtMostOption = None,
    runtime: options.RuntimeOption = None,
    max_bops: options.MaxBopsOption = None,
    latency: options.LatencyOption = None,
    latency_device: options.LatencyDeviceOption = None,
    max_ms: options.MaxMsOption = None,
    solver: options.SolverOption = "certified",
    refine: options.RefineOption = None,
    guard: options.GuardOption = 64,
    search_tokens: options.SearchTokensOption = 500_000,
    bootstrap: options.BootstrapOption = 200,
    storage: options.StorageOption = None,
    study: options.StudyOption = None,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    quiet: options.QuietOption = False,
) -> None:
    """The main job: profile, solve with a certificate, refine, validate on held-out text, report.

    After an interruption the same command, or --resume RUN, goes on where it stopped.
    """
    from ._base.progress import Reporter
    from .jobs.record import JobRecord
    from .jobs.search import run_search
    from .jobs.settings import SearchSettings, read_settings
    from .reports.html import write_report
    from .reports.terminal import print_summary

    if resume is not None:
        options.check_alone(context_, "resume", "quiet")
        run, record = resume, JobRecord.load(resume)
        settings, wanted = read_settings(record.settings)
        wanted = replace(wanted, command=record.command.text)
    else:
        if vram is None and max_kl is None and max_ppl is None:
            budget = budget or "4.3bpw"
        limits = options.limit_options(
            pin, ban, at_least, at_most, runtime, max_bops, latency, latency_device, max_ms
        )
        settings = options.profile_settings(
            model,
            formats,
            include,
            exclude,
            group,
            runtime,
            metric=metric,
            rounding=rounding,
            calibration=calibration,
            sequences=sequences,
            length=length,
            batch_tokens=batch_tokens,
            seed=seed,
            device=device,
        )
        wanted = SearchSettings(
            budget=budget,
            vram=vram,
            max_kl=max_kl,
            max_ppl=max_ppl,
            fastest=fastest,
            context=context,
            batch=batch,
            solver=solver,
            refine=refine,
            guard=guard,
            search_tokens=search_tokens,
            bootstrap=bootstrap,
            storage=storage,
            study=study,
            evaluation=evaluation,
            eval_tokens=eval_tokens,
            command=options.command(),
            **limits,
        )
        run = run or Path("runs") / f"{options.run_name(model)}-{wanted.goal}"
    plan = run_search(settings, wanted, run, Reporter(quiet))
    *_, report = write_report(run)
    print_summary(out, plan, {"report": report})
    same = () if plan.runtime is None else ("--for", plan.runtime)
    hint("Another budget, at once:", "solve", run / "profile.safetensors", *same, "--budget …")


@app.command()
def worker(
    storage: Annotated[
        str, typer.Option(help="Optuna storage URL that a search with tpe or nsga2 was given.")
    ],
    study: Annotated[
        str | None, typer.Option(help="Name of the study; needed if there are several.")
    ] = None,
    device: options.DeviceOption = "auto",
    quiet: options.QuietOption = False,
) -> None:
    """Help a search with tpe or nsga2 that runs elsewhere, until it is complete.

    The storage tells the worker everything: model, text, budget. A worker that is killed loses
    nothing: another one runs its trial again.
    """
    from ._base.progress import Reporter
    from .jobs.worker import run_worker

    done = run_worker(storage, study, device, Reporter(quiet))
    out.print(f"The study is complete; this worker ran {done} of its trials.")


@app.command()
def jobs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to look for runs.")
    ] = Path("runs"),
) -> None:
    """List the runs in a folder: what they do, how far they are, what they found."""
    from .jobs.listing import list_jobs
    from .reports.terminal import jobs_table

    if not folder.is_dir() and folder != Path("runs"):
        raise ValueError(f"There is no folder {folder}. Give the one that holds the runs.")
    found = list_jobs(folder)
    if not found:
        out.print(f"No runs in {folder}. `bitplan search` makes one.", markup=False)
        return
    out.print(jobs_table(found))


@app.command()
def profile(
    model: options.ModelArgument = "smollm2",
    run: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder; default runs/MODEL.")
    ] = None,
    formats: options.FormatsOption = None,
    metric: options.MetricOption = "fisher",
    rounding: options.RoundingOption = "rtn",
    calibration: options.CalibrationOption = "builtin",
    sequences: options.SequencesOption = 96,
    length: options.LengthOption = 128,
    batch_tokens: options.BatchTokensOption = 768,
    include: options.IncludeOption = None,
    exclude: options.ExcludeOption = None,
    group: options.GroupOption = None,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    quiet: options.QuietOption = False,
) -> None:
    """Price every layer in every format and save the table; `bitplan solve` reads it."""
    from ._base.progress import Reporter
    from .jobs.search import run_profile

    run = run or Path("runs") / options.run_name(model)
    settings = options.profile_settings(
        model,
        formats,
        include,
        exclude,
        group,
        metric=metric,
        rounding=rounding,
        calibration=calibration,
        sequences=sequences,
        length=length,
        batch_tokens=batch_tokens,
        seed=seed,
        device=device,
    )
    table = run_profile(settings, run, Reporter(quiet))
    nats = table.provenance.words.nats
    shown = Table("format", "bpw", f"predicted KL ({nats})", title="Uniform plans")
    for i, name in enumerate(table.formats):
        bpw = 8 * table.uniform_bytes(name) / table.weights
        shown.add_row(name, f"{bpw:.3f}", f"{table.kl[:, i].sum():.4g}")
    out.print(shown)
    hint("Next:", "solve", run / "profile.safetensors", "--budget …")


@app.command()
def solve(
    path: options.ProfileArgument,
    budget: options.SolveBudgetOption = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="The smallest plan within --budget of at most this predicted KL, in nats per "
            "token (per sample without text)."
        ),
    ] = None,
    fastest: Annotated[
        bool,
        typer.Option(
            "--fastest",
            help="With --max-kl and --latency-device (or --latency): the fastest instead of the "
            "smallest; of any size without --budget.",
        ),
    ] = False,
    pin: options.PinOption = None,
    ban: options.BanOption = None,
    at_least: options.AtLeastOption = None,
    at_most: options.AtMostOption = None,
    runtime: options.RuntimeOption = None,
    max_bops: options.MaxBopsOption = None,
    latency: options.LatencyOption = None,
    latency_device: options.LatencyDeviceOption = None,
    max_ms: options.MaxMsOption = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="With --latency-device: sequences at a time, a token of each per step."
        ),
    ] = 1,
    formats: options.SomeFormatsOption = None,
    group: options.FuseOption = None,
    solver: options.SolverOption = "certified",
    seed: options.SeedOption = 0,
    plan_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan to this .json file.")
    ] = None,
    program: Annotated[
        Path | None,
        typer.Option(help="Also write the integer program, as .lp or .mps, for any other solver."),
    ] = None,
) -> None:
    """Answer a what-if in a moment: another budget, limits or formats from a saved profile."""
    from ._base.files import check_file
    from .reports.terminal import print_summary
    from .search.budget import Budget
    from .search.solve import solve as run_solver
    from .search.solve import write_program

    options.check_json(plan_file)
    if program is not None:
        check_file(program, (".lp", ".mps"), "--program", "plan.lp")
    limited = options.limit_options(
        pin, ban, at_least, at_most, runtime, max_bops, latency, latency_device, max_ms
    )
    limits = options.limits_of(formats, group, limited, batch)
    if program is not None and fastest:
        raise ValueError("--program writes what --budget asks for, not --fastest.")
    asked = None if fastest and budget is None else Budget.parse(budget or "4.3bpw")
    table = options.load_profile(path, runtime)
    files = {}
    if program is not None and asked is not None:
        write_program(table, asked, limits, program)
        files["program"] = program
    plan = run_solver(
        table,
        asked,
        solver=solver if max_kl is None else "bisection",
        limits=limits,
        max_kl=max_kl,
        fastest=fastest,
        seed=seed,
        command=options.command(),
    )
    if plan_file is not None:
        plan.save(plan_file)
        files["plan"] = plan_file
    print_summary(out, plan, files)
    if plan_file is None:
        out.print("Not saved; add --out plan.json to quantize or evaluate this plan.")


@app.command()
def frontier(
    path: options.ProfileArgument,
    pin: options.PinOption = None,
    ban: options.BanOption = None,
    at_least: options.AtLeastOption = None,
    at_most: options.AtMostOption = None,
    runtime: options.RuntimeOption = None,
    formats: options.SomeFormatsOption = None,
    group: options.FuseOption = None,
    frontier_file: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the whole frontier to this .json file."),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Budgets to print.")] = 15,
) -> None:
    """Print the plans from the smallest to the largest budget, next to the uniform ones.

    The limits are those of `bitplan solve` but for operations and time (--max-bops, --max-ms),
    which every budget has a plan of its own for: ask `bitplan solve` for one budget after another.
    """
    import numpy as np

    from .search.frontier import Frontier
    from .search.limits import build_problem

    options.check_json(frontier_file, example="frontier.json")
    limited = options.limit_options(pin, ban, at_least, at_most, runtime)
    limits = options.limits_of(formats, group, limited)
    table = limits.for_runtime(options.load_profile(path, runtime))
    model = table.provenance.model
    whole = Frontier.from_problem(build_problem(table, limits), model if model.sha256 else None)
    nats = table.provenance.words.nats
    shown = Table("plan", "bytes", "bpw", f"predicted KL ({nats})")
    rows = [(u.name, u.bytes, u.predicted_kl) for u in whole.uniform]
    picks = np.unique(np.linspace(0, len(whole.bytes) - 1, points).astype(int))
    rows += [("bitplan", int(whole.bytes[i]), float(whole.predicted_kl[i])) for i in picks]
    for name, size, kl in sorted(rows, key=lambda row: row[1]):
        shown.add_row(name, f"{size:,}", f"{8 * size / table.weights:.3f}", f"{kl:.4g}")
    out.print(shown)
    if frontier_file is not None:
        whole.save(frontier_file)
        out.print(f"Frontier: {frontier_file}", markup=False)


for commands in (packed, exporting, kernels, reporting, listing):
    app.add_typer(commands.app)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    Console(stderr=True).print(f"Note: {message}", markup=False, style="yellow")


def main() -> None:
    """Entry point: bad input prints one clear message and exits with 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        _fail(str(error))
    except RuntimeError as error:
        if not ("can't allocate" in str(error) or "OutOfMemory" in type(error).__name__):
            raise
        _fail("Out of memory. Use fewer --batch-tokens, or a machine with more memory.")
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            Console(stderr=True).print(
                "Interrupted. Finished stages are kept: the same command goes on from there."
            )
        raise


def _fail(message: str) -> None:
    errors = Console(stderr=True)
    errors.print("[red]Error:[/] ", end="")
    # In a pipe or a log a path stays in one piece.
    errors.print(message, markup=False, highlight=False, soft_wrap=not errors.is_terminal)
    sys.exit(1)


if __name__ == "__main__":
    main()

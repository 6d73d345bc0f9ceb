"""Command line: ``bitplan`` or ``python -m bitplan``."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ._registry import Registry
    from .search.job import ProfileSettings

# Threads that wait by spinning make torch many times slower when other programs use the cores.
# Read when torch is loaded, so it is set before any command imports it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_INTERRUPTED = 130  # exit code of Ctrl-C

app = typer.Typer(
    name="bitplan",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Decides how many bits each part of a neural network gets, and proves how close to "
    "optimal the answer is.",
)
out = Console()

_MODEL_HELP = (
    "Hugging Face id or folder, .gguf file, 'smollm2' (the embedded default) or "
    "file.py:function returning a bitplan.Workload."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
BudgetOption = Annotated[
    str,
    typer.Option(
        "--budget",
        "-b",
        help="Bits per weight of everything stored (4.3bpw), bytes (750MB, 6GiB), a ratio to "
        "16 bits (0.3x) or the size of the written file (file:82MB).",
    ),
]
FormatsOption = Annotated[
    str | None,
    typer.Option(help="Comma-separated candidate formats; `bitplan formats` shows the default."),
]
MetricOption = Annotated[str, typer.Option(help="Sensitivity metric; see `bitplan metrics`.")]
RoundingOption = Annotated[str, typer.Option(help="Rounding method whose errors are priced.")]
CalibrationOption = Annotated[
    str,
    typer.Option(
        help="Calibration text: 'builtin' (English prose that ships with Python), a text file, "
        "or 'self' (sampled from the model)."
    ),
]
SequencesOption = Annotated[
    int, typer.Option(min=1, help="Calibration sequences; prices err by about sqrt(2/N).")
]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]
BatchTokensOption = Annotated[
    int, typer.Option(min=1, help="Tokens per pass: fewer take less memory and more time.")
]
IncludeOption = Annotated[
    list[str] | None, typer.Option(help="Glob on layer names to quantize; repeatable.")
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(help="Glob on layer names to leave as they are; repeatable.")
]
GroupOption = Annotated[
    list[str] | None,
    typer.Option(help="Layers that share one format, such as 'q_proj,k_proj,v_proj'; repeatable."),
]
PinOption = Annotated[
    list[str] | None,
    typer.Option(help="GLOB=FORMAT: layers that must take a format; repeatable."),
]
SolverOption = Annotated[str, typer.Option(help="Solver; see `bitplan solvers`.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same plan.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
TextOption = Annotated[str, typer.Option(help="Held-out text: 'builtin' or a text file.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def _settings(
    model: str,
    formats: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    group: list[str] | None,
    **others: Any,
) -> ProfileSettings:
    from .search.job import ProfileSettings
    from .sensitivity.profile import DEFAULT_FORMATS

    return ProfileSettings(
        model=model,
        formats=_split(formats) if formats else DEFAULT_FORMATS,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        groups=tuple(group or ()),
        **others,
    )


@app.command()
def search(
    model: ModelArgument = "smollm2",
    budget: BudgetOption = "4.3bpw",
    run: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run folder; default runs/MODEL-BUDGET."),
    ] = None,
    formats: FormatsOption = None,
    metric: MetricOption = "fisher",
    rounding: RoundingOption = "rtn",
    calibration: CalibrationOption = "builtin",
    sequences: SequencesOption = 96,
    length: LengthOption = 128,
    batch_tokens: BatchTokensOption = 768,
    evaluation: Annotated[
        str, typer.Option("--eval", help="Held-out text: 'builtin' or a text file.")
    ] = "builtin",
    eval_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens to measure on.")] = 16384,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    group: GroupOption = None,
    pin: PinOption = None,
    solver: SolverOption = "certified",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """The main job: profile, solve with a certificate, validate on held-out text, report.

    Run the same command again after an interruption: finished stages are not repeated.
    """
    from .reports.html import write_report
    from .reports.terminal import print_summary
    from .search.job import SearchSettings, run_search
    from .sensitivity.progress import Reporter

    run = run or Path("runs") / f"{_run_name(model)}-{budget}".replace(":", "-")
    settings = _settings(
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
    wanted = SearchSettings(
        budget=budget,
        solver=solver,
        pins=_pins(pin),
        evaluation=evaluation,
        eval_tokens=eval_tokens,
        command=_command(),
    )
    plan = run_search(settings, wanted, run, Reporter(quiet))
    written = write_report(run)
    files = {path.name: path for path in [run / "plan.json", run / "frontier.json", *written]}
    print_summary(out, plan, files)
    _hint("Another budget, at once:", "solve", run / "profile.safetensors", "--budget …")


@app.command()
def profile(
    model: ModelArgument = "smollm2",
    run: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder; default runs/MODEL.")
    ] = None,
    formats: FormatsOption = None,
    metric: MetricOption = "fisher",
    rounding: RoundingOption = "rtn",
    calibration: CalibrationOption = "builtin",
    sequences: SequencesOption = 96,
    length: LengthOption = 128,
    batch_tokens: BatchTokensOption = 768,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    group: GroupOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Price every layer in every format and save the table; `bitplan solve` reads it."""
    from .search.job import run_profile
    from .sensitivity.progress import Reporter

    run = run or Path("runs") / _run_name(model)
    settings = _settings(
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
    shown = Table("format", "bpw", "predicted KL (nats/token)", title="Uniform plans")
    for i, name in enumerate(table.formats):
        bpw = 8 * table.uniform_bytes(name) / table.weights
        shown.add_row(name, f"{bpw:.3f}", f"{table.kl[:, i].sum():.4g}")
    out.print(shown)
    _hint("Next:", "solve", run / "profile.safetensors", "--budget …")


@app.command()
def solve(
    path: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.safetensors.")],
    budget: BudgetOption = "4.3bpw",
    pin: PinOption = None,
    formats: Annotated[
        str | None, typer.Option(help="Use only these of the profile's formats, comma-separated.")
    ] = None,
    solver: SolverOption = "certified",
    seed: SeedOption = 0,
    plan_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan here.")
    ] = None,
) -> None:
    """Answer a what-if in a moment: another budget, pins or formats from a saved profile."""
    from .reports.terminal import print_summary
    from .search.solve import solve as run_solver

    plan = run_solver(
        path,
        budget,
        solver=solver,
        pins=_pins(pin),
        formats=_split(formats) if formats else None,
        seed=seed,
        command=_command(),
    )
    files = {}
    if plan_file is not None:
        _check_json(plan_file)
        plan.save(plan_file)
        files["plan"] = plan_file
    print_summary(out, plan, files)
    if plan_file is None:
        out.print("Not saved; add --out plan.json to quantize or evaluate this plan.")


@app.command()
def frontier(
    path: Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile.safetensors.")],
    pin: PinOption = None,
    frontier_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the whole frontier as JSON.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Budgets to print.")] = 15,
) -> None:
    """Print the plans from the smallest to the largest budget, next to the uniform ones."""
    import numpy as np

    from .search.frontier import Frontier
    from .search.problem import Problem
    from .sensitivity.table import SensitivityTable

    table = SensitivityTable.load(path)
    whole = Frontier.from_problem(Problem.from_table(table, _pins(pin)))
    shown = Table("plan", "bytes", "bpw", "predicted KL")
    rows = [(u.name, u.bytes, u.predicted_kl) for u in whole.uniform]
    picks = np.unique(np.linspace(0, len(whole.bytes) - 1, points).astype(int))
    rows += [("bitplan", int(whole.bytes[i]), float(whole.predicted_kl[i])) for i in picks]
    for name, size, kl in sorted(rows, key=lambda row: row[1]):
        shown.add_row(name, f"{size:,}", f"{8 * size / table.weights:.3f}", f"{kl:.4g}")
    out.print(shown)
    if frontier_file is not None:
        _check_json(frontier_file)
        whole.save(frontier_file)
        out.print(f"Frontier: {frontier_file}", markup=False)


@app.command()
def quantize(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    quiet: QuietOption = False,
) -> None:
    """Write the packed mixed-precision weights of a plan."""
    from .search.budget import format_bytes
    from .search.materialize import quantize as write
    from .search.plan import Plan
    from .sensitivity.progress import Reporter

    write(plan, folder, reporter=Reporter(quiet))
    whole = (folder / "model.safetensors").stat().st_size
    planned = Plan.load(plan).bytes
    out.print(
        f"{format_bytes(whole)}: {format_bytes(planned)} of planned weights, and "
        f"{format_bytes(whole - planned)} that the plan leaves as it was"
    )
    _hint("Next:", "eval", folder)


@app.command(name="eval")
def evaluate(
    target: Annotated[
        Path,
        typer.Argument(metavar="PLAN|FOLDER", help="A plan.json, a run or a packed folder."),
    ],
    text: TextOption = "builtin",
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens to measure on; by default as many as the plan was."),
    ] = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Measure KL divergence and perplexity of a plan or a packed folder against the original."""
    from .search.job import run_eval
    from .sensitivity.progress import Reporter

    plan, result, ppl_original = run_eval(target, text, tokens, device, Reporter(quiet))
    shown = Table("", "value", title=escape(str(target)))
    shown.add_row("measured KL", f"{result.mean_kl:.6g} ± {result.kl_stderr:.2g} nats/token")
    shown.add_row("predicted KL", f"{plan.predicted_kl:.6g} ± {plan.predicted_kl_stderr:.2g}")
    if (before := plan.measured) is not None:
        recorded = f"{before.kl:.6g} ({before.tokens:,} positions of {before.text})"
        shown.add_row("KL recorded in the plan", escape(recorded))
    if result.perplexity is not None:
        shown.add_row("perplexity", f"{result.perplexity:.4f} (original {ppl_original:.4f})")
    shown.add_row("positions", f"{result.tokens:,}")
    out.print(shown)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A packed folder.")],
    prompt: Annotated[
        str, typer.Option(help="What the model continues.")
    ] = "The capital of France is",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    device: DeviceOption = "auto",
) -> None:
    """Generate text with a packed model (greedy)."""
    from .search.materialize import load_packed

    if not prompt:
        raise ValueError("The prompt is empty. Give the model something to continue.")
    model = load_packed(folder, device)
    tokenizer = model.workload.tokenizer
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer, so it cannot generate text.")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.module.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=max_tokens, do_sample=False
    )
    out.print(tokenizer.decode(tokens[0], skip_special_tokens=True), markup=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Draw a run's figures and report.html again."""
    from .reports.html import write_report

    for path in write_report(run):
        out.print(str(path), markup=False)


@app.command()
def formats() -> None:
    """List the default candidate formats and the grammar of all others."""
    from .quantizers.format import Format
    from .sensitivity.profile import DEFAULT_FORMATS

    shown = Table("format", "bits per weight", title="Default candidates")
    for name in DEFAULT_FORMATS:
        size = Format.parse(name).stored_bytes((4096, 4096))
        shown.add_row(name, f"{8 * size / 4096**2:.4f}")
    out.print(shown)
    out.print(
        "Any of int{1..8}-g{32|64|128|256|c|t}[-asym], bf16, fp16, fp32, keep works with "
        "--formats: bits, weights per scale (c = one per output channel, t = one per tensor), and "
        "-asym for a stored zero point.",
        markup=False,
    )


@app.command()
def metrics() -> None:
    """List the sensitivity metrics."""
    from .sensitivity.metrics import METRICS

    _list_plugins(METRICS)


@app.command()
def solvers() -> None:
    """List the solvers."""
    from .search.solvers import SOLVERS

    _list_plugins(SOLVERS)


def _list_plugins(registry: Registry[Any]) -> None:
    shown = Table("name", "what it does")
    for name in registry.names():
        shown.add_row(name, escape((registry.get(name).__doc__ or "").strip().splitlines()[0]))
    out.print(shown)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _pins(pins: list[str] | None) -> dict[str, str]:
    parsed = {}
    for pin in pins or ():
        glob, separator, name = pin.partition("=")
        if not separator:
            raise ValueError(f"--pin {pin!r} is not GLOB=FORMAT, such as 'lm_head=int6-g64-asym'.")
        parsed[glob] = name
    return parsed


def _command() -> str:
    return shlex.join(["bitplan", *sys.argv[1:]])


def _hint(text: str, *command: object) -> None:
    words = [part if part == "--budget …" else shlex.quote(str(part)) for part in command]
    out.print(f"{text} bitplan {' '.join(map(str, words))}", markup=False, soft_wrap=True)


def _check_json(path: Path) -> None:
    if path.suffix != ".json":
        raise ValueError(f"--out {path} would not be a .json file. Give a name such as plan.json.")


def _run_name(model: str) -> str:
    return Path(model).name.removesuffix(".gguf").replace(".py:", "-").replace(":", "-")


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
    errors.print(message, markup=False, highlight=False)
    sys.exit(1)


if __name__ == "__main__":
    main()

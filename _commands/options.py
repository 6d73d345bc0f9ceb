"""Options of the command line, each spelled once, and what they mean together."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..jobs.settings import ProfileSettings
    from ..search.limits import Limits
    from ..sensitivity.table import SensitivityTable

_GOAL, _LIMITS = "Goal (one of them)", "Limits"  # panels of --help
_PRICES, _SEARCH = "Candidates and prices", "Search and validation"

_MODEL_HELP = (
    "Hugging Face id or folder, .gguf file, 'smollm2' (the embedded default) or "
    "file.py:function returning a bitplan.Workload."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
_BUDGET_HELP = (
    "Bits per weight of everything stored (4.3bpw), bytes (750MB, 6GiB), a ratio to 16 bits "
    "(0.3x) or the size of the written file (file:82MB)."
)
SolveBudgetOption = Annotated[
    str | None, typer.Option("--budget", "-b", help=_BUDGET_HELP + " Default 4.3bpw.")
]
SearchBudgetOption = Annotated[
    str | None,
    typer.Option("--budget", "-b", help=_BUDGET_HELP + " Default 4.3bpw.", rich_help_panel=_GOAL),
]
FormatsOption = Annotated[
    str | None,
    typer.Option(
        help="Candidate formats, comma-separated; default and grammar: `bitplan formats`.",
        rich_help_panel=_PRICES,
    ),
]
MetricOption = Annotated[
    str, typer.Option(help="Sensitivity metric; see `bitplan metrics`.", rich_help_panel=_PRICES)
]
RoundingOption = Annotated[
    str,
    typer.Option(
        help="Rounding method whose errors are priced; rtn rounds to nearest, with clipping.",
        rich_help_panel=_PRICES,
    ),
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        help="Calibration text: 'builtin' (English prose that ships with Python), a text file, "
        "or 'self' (sampled from the model).",
        rich_help_panel=_PRICES,
    ),
]
SequencesOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Calibration sequences N; a price errs by about sqrt(2/N). Like the next two, not "
        "used by a Workload with batches of its own.",
        rich_help_panel=_PRICES,
    ),
]
LengthOption = Annotated[
    int,
    typer.Option(
        min=2, help="Tokens per sequence, to calibrate and to measure.", rich_help_panel=_PRICES
    ),
]
BatchTokensOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Tokens per pass: fewer take less memory and more time.",
        rich_help_panel=_PRICES,
    ),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(help="Glob on layer names to quantize; repeatable.", rich_help_panel=_PRICES),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Glob on layer names to leave as they are; repeatable.", rich_help_panel=_PRICES
    ),
]
_GROUP_HELP = "Layers that share one format, such as 'q_proj,k_proj,v_proj'; repeatable."
GroupOption = Annotated[list[str] | None, typer.Option(help=_GROUP_HELP, rich_help_panel=_PRICES)]
# On a saved profile formats and groups are limits, as the others are.
SomeFormatsOption = Annotated[
    str | None,
    typer.Option(
        help="Use only these of the profile's formats, comma-separated.", rich_help_panel=_LIMITS
    ),
]
FuseOption = Annotated[
    list[str] | None, typer.Option("--group", help=_GROUP_HELP, rich_help_panel=_LIMITS)
]
PinOption = Annotated[
    list[str] | None,
    typer.Option(
        help="GLOB=FORMAT: layers that must take a format; repeatable.", rich_help_panel=_LIMITS
    ),
]
SolverOption = Annotated[
    str, typer.Option(help="Solver; see `bitplan solvers`.", rich_help_panel=_SEARCH)
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same plan.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
_HELD_OUT_HELP = "Held-out text: 'builtin' (prose that ships with Python) or a text file."
TextOption = Annotated[str, typer.Option("--text", "--eval", help=_HELD_OUT_HELP)]
ProfileArgument = Annotated[
    Path, typer.Argument(metavar="PROFILE|RUN", help="A profile.safetensors, or its run folder.")
]
PlanArgument = Annotated[
    Path,
    typer.Argument(metavar="PLAN|RUN|FOLDER", help="A plan.json, a run or a packed folder."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
OutRunOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Run folder; default runs/MODEL-GOAL.")
]
AtLeastOption = Annotated[
    list[str] | None,
    typer.Option(
        "--min",
        help="GLOB=FORMAT: layers that take no fewer bits; repeatable.",
        rich_help_panel=_LIMITS,
    ),
]
AtMostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--max",
        help="GLOB=FORMAT: layers that take no more bits; repeatable.",
        rich_help_panel=_LIMITS,
    ),
]
BanOption = Annotated[
    list[str] | None,
    typer.Option(
        help="GLOB=FORMAT-GLOB: formats that layers must not take; repeatable.",
        rich_help_panel=_LIMITS,
    ),
]
RuntimeOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Keep to what a runtime can run, and count the bytes its files take where bitplan "
        "writes them: autoround, gptq, llama.cpp, mlx, onnx, transformers, vllm, ...",
        rich_help_panel=_LIMITS,
    ),
]
MaxBopsOption = Annotated[
    str | None,
    typer.Option(
        help="Most bit operations (weight bits x 16) per token, such as 12G.",
        rich_help_panel=_LIMITS,
    ),
]
LatencyOption = Annotated[
    Path | None,
    typer.Option(
        help="JSON of measured milliseconds by layer and format; the plan says its time, --max-ms "
        "limits it.",
        rich_help_panel=_LIMITS,
    ),
]
LatencyDeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Predict milliseconds per step of --batch tokens on a device: h100, a100:humming, ... "
        "(`bitplan kernels devices`), or a file of `bitplan kernels bench --refit`.",
        rich_help_panel=_LIMITS,
    ),
]
MaxMsOption = Annotated[
    float | None,
    typer.Option(
        help="Most milliseconds per step; with --latency-device or --latency.",
        rich_help_panel=_LIMITS,
    ),
]
FastestOption = Annotated[
    bool,
    typer.Option(
        "--fastest",
        help="With --max-kl or --max-ppl: the fastest instead of the smallest plan that reaches "
        "it; needs --latency-device or --latency.",
        rich_help_panel=_GOAL,
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        help="Optuna storage URL of a search with tpe or nsga2; default job.sqlite in the run "
        "folder.",
        rich_help_panel=_SEARCH,
    ),
]
VramOption = Annotated[
    str | None,
    typer.Option(
        help="Memory for weights and KV cache together, such as 8GiB.",
        rich_help_panel=_GOAL,
    ),
]
MaxKlOption = Annotated[
    float | None,
    typer.Option(
        help="The smallest plan whose measured KL is at most this, in nats per token (per sample "
        "without text).",
        rich_help_panel=_GOAL,
    ),
]
MaxPplOption = Annotated[
    float | None,
    typer.Option(
        help="The smallest plan whose measured perplexity is at most this.", rich_help_panel=_GOAL
    ),
]
ContextOption = Annotated[
    int, typer.Option(min=1, help="With --vram: tokens per sequence.", rich_help_panel=_GOAL)
]
BatchOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="With --vram or --latency-device: sequences at a time, a token of each per step.",
        rich_help_panel=_GOAL,
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(help="Go on with the run in this folder, with the settings it recorded."),
]
EvalTextOption = Annotated[
    str,
    typer.Option("--eval", help=_HELD_OUT_HELP, rich_help_panel=_SEARCH),
]
EvalTokensOption = Annotated[
    int,
    typer.Option(min=2, help="Held-out tokens to measure on.", rich_help_panel=_SEARCH),
]
RefineOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Most steps of refinement: prices at the plan's own weights, accepted on measured KL. "
        "By default 3 when the predicted KL is above 0.2, else 0.",
        rich_help_panel=_SEARCH,
    ),
]
GuardOption = Annotated[
    int,
    typer.Option(
        min=8,
        help="Further calibration sequences, kept apart to measure candidates on.",
        rich_help_panel=_SEARCH,
    ),
]
SearchTokensOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Tokens (samples without text) that a solver on measured KL (evolutionary, tpe, ...) "
        "may measure.",
        rich_help_panel=_SEARCH,
    ),
]
BootstrapOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Resamples of the calibration that say how sure each format is; 0 for none.",
        rich_help_panel=_SEARCH,
    ),
]
StudyOption = Annotated[
    str | None,
    typer.Option(
        help="Name of the study in --storage; default made of run, solver, bytes and seed.",
        rich_help_panel=_SEARCH,
    ),
]


def profile_settings(
    model: str,
    formats: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    group: list[str] | None,
    runtime: str | None = None,
    **others: Any,
) -> ProfileSettings:
    """Settings of a profile; a runtime brings its own default formats."""
    from ..jobs.settings import ProfileSettings
    from ..quantizers.candidates import DEFAULT_FORMATS
    from ..quantizers.runtimes import Rules

    # bf16 for the layers a runtime leaves as they are, should it not take the model's own dtype.
    default = (*Rules.load(runtime).candidates, "bf16") if runtime else DEFAULT_FORMATS
    return ProfileSettings(
        model=model,
        formats=split(formats) if formats else default,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        groups=tuple(group or ()),
        **others,
    )


def limit_options(
    pin: list[str] | None,
    ban: list[str] | None,
    at_least: list[str] | None,
    at_most: list[str] | None,
    runtime: str | None,
    max_bops: str | None = None,
    latency: Path | None = None,
    latency_device: str | None = None,
    max_ms: float | None = None,
) -> dict[str, Any]:
    """The fields of ``SearchSettings`` that limit a plan besides its bytes."""
    from ..search.limits import parse_assignments, parse_bans
    from ..search.limits.bops import parse_count

    return {
        "pins": parse_assignments("--pin", pin or []),
        "bans": parse_bans(ban or []),
        "at_least": parse_assignments("--min", at_least or []),
        "at_most": parse_assignments("--max", at_most or []),
        "runtime": runtime,
        "max_bops": None if max_bops is None else parse_count(max_bops),
        "latency": None if latency is None else str(latency),
        "latency_device": latency_device,
        "max_ms": max_ms,
    }


def limits_of(
    formats: str | None, group: list[str] | None, options: dict[str, Any], batch: int = 1
) -> Limits:
    """The same as limits on a saved profile, which may use fewer formats and fuse more layers."""
    from dataclasses import replace

    from ..jobs.settings import SearchSettings

    limits = SearchSettings(budget="0", batch=batch, **options).limits()
    return replace(limits, formats=split(formats) if formats else None, groups=tuple(group or ()))


def split(text: str) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_alone(context: typer.Context, option: str, *allowed: str) -> None:
    """Raise if other options were typed next to one that stands for all of them."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in (option, *allowed) and source and source.name == "COMMANDLINE":
            flag = parameter.opts[0] if parameter.opts[0].startswith("-") else name.upper()
            raise ValueError(
                f"--{option} goes on with the recorded settings: leave out {flag}, or give the "
                "whole command again with another --out."
            )


def command() -> str:
    """The command line, without the password a storage URL may hold."""
    words = [re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", word) for word in sys.argv[1:]]
    return shlex.join(["bitplan", *words])


def check_json(path: Path | None, option: str = "--out", example: str = "plan.json") -> None:
    """Raise, before anything is computed, if a file to write would not be JSON or writable."""
    from .._base.files import check_file

    if path is not None:
        check_file(path, (".json",), option, example)


def load_profile(path: Path, runtime: str | None) -> SensitivityTable:
    """The profile in a run folder or a file.

    Says if the run was for another runtime, and if the profile lacks formats that suit this one.
    """
    from ..jobs.folder import RunFolder
    from ..quantizers.runtimes import Rules
    from ..search.plan import Plan
    from ..sensitivity.table import SensitivityTable

    run = RunFolder(path)
    table = SensitivityTable.load(run.profile if path.is_dir() else path)
    before = Plan.load(run.plan).runtime if run.plan.is_file() else None
    if before not in (None, runtime):
        typer.echo(f"{path} was searched for {before}: --for {before} keeps to it.", err=True)
    if runtime is not None:
        wanted = set(Rules.load(runtime).candidates) - {"keep"}
        lacking = wanted - set(table.formats)
        if 2 * len(lacking) > len(wanted):
            typer.echo(
                f"The profile lacks {len(lacking)} of the {len(wanted)} formats that suit "
                f"{runtime}: a search or profile with --for {runtime} finds better plans.",
                err=True,
            )
    return table


def run_name(model: str) -> str:
    """A model's name as part of a folder's."""
    return Path(model).name.removesuffix(".gguf").replace(".py:", "-").replace(":", "-")

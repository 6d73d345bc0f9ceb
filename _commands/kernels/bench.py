"""`bitplan kernels bench`: the speed of kernels, measured on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .. import options
from ..console import hint, out
from ..derive import split
from ..lazy import verb

if TYPE_CHECKING:
    from ...kernels.lab.bench import Row
    from ...kernels.latency import Device

app = verb()

_FOR_REFIT = ((2048, 2048), (1024, 1024), (4096, 2048))  # outputs and inputs


@app.command()
def bench(
    device: options.DeviceOption = "auto",
    bits: Annotated[
        str | None,
        typer.Option(help="Widths, comma-separated; 16 is bf16. Default 1 to 8; all with --refit."),
    ] = None,
    m: Annotated[
        str, typer.Option("--m", "--batch", help="Vectors (tokens) at a time, comma-separated.")
    ] = "1,8,64",
    n: Annotated[
        str | None, typer.Option("--n", help="Output features, comma-separated. Default 2048.")
    ] = None,
    k: Annotated[
        str | None,
        typer.Option("--k", help="Input features, as many as --n. Default as --n."),
    ] = None,
    group: Annotated[
        int,
        typer.Option(
            "--group-size", "--group", help="Weights per scale and zero point: 32, 64, 128 or 256."
        ),
    ] = 128,
    seconds: Annotated[
        float, typer.Option(min=0, help="Seconds to spend on each width of each shape.")
    ] = 0.5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the timings to this .json file as well.")
    ] = None,
    refit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Fit the latency model to the timings and write it here, for --latency-device.",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="On a GPU: first choose how to launch by measurement; kept for later runs.",
        ),
    ] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Time packed products of every width on this machine, next to the float32 product.

    The products take turns, each with several copies of its weights, and the fastest call of each
    counts, so other load hardly matters. --m 1 is decoding one sequence, 64 a short prompt: of more
    than 32 vectors a CPU unpacks the weights at every call, and is slower than in float32.
    """
    import torch

    from ..._base.files import check_file, write_json
    from ..._base.progress import Reporter
    from ...kernels.lab import bench as measuring
    from ...models.load import find_device

    where = find_device(device)
    options.check_json(json_file, "--json", "timings.json")
    if refit is not None:
        check_file(refit, (".toml",), "--refit", "my.toml")
    shapes = measuring.grid(_whole("--m", m), _matrices(n, k, _FOR_REFIT if refit else None))
    default = "1,2,3,4,5,6,7,8" + (",16" if refit else "")
    widths = _whole("--bits", bits or default)
    measuring.check(shapes, widths)
    if group not in (32, 64, 128, 256):
        raise ValueError(f"--group-size {group} is none of 32, 64, 128 and 256.")
    reporter = Reporter(quiet)
    if tune:
        with reporter.bar("Tuning", len(shapes)) as advance:
            measuring.tune(shapes, widths, where, _base(where), group, advance)
    with reporter.bar("Timing", len(shapes)) as advance:
        rows = measuring.bench(
            shapes, widths, where, group_size=group, seconds=seconds, advance=advance
        )
    about = _about(where)
    out.print(_table(rows, about))
    if where.type == "cpu" and (note := _note(rows)):
        out.print(note, markup=False, highlight=False)
    if json_file is not None:
        kept = [{key: asdict(row)[key] for key in _KEYS} for row in rows if row.bits != _FP32]
        write_json(
            json_file,
            {"rows": kept, "device": about, "group": group, "torch": torch.__version__},
        )
        out.print(f"Timings: {json_file}", markup=False)
    if refit is not None:
        base = _base(where)
        source = f"bitplan kernels bench on {about}, groups of {group}"
        fitted = measuring.refit(base, rows, refit.stem, source)
        fitted = fitted.model_copy(update={"description": about})
        fitted.save(refit)
        out.print(_fit_table(fitted, [row for row in rows if row.bits != _FP32]))
        hint("Use it:", "solve", "PROFILE", "--latency-device", refit, "--max-ms", "…")


_KEYS = ("bits", "m", "n", "k", "seconds", "speedup_vs_fp32")
_FP32 = 32


def _whole(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in split(text)]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} must be whole numbers such as 1,8,64.") from error


def _matrices(
    n: str | None, k: str | None, default: tuple[tuple[int, int], ...] | None
) -> list[tuple[int, int]]:
    if n is None and k is None:
        return list(default or ((2048, 2048),))
    outputs = _whole("--n", n or k or "")
    inputs = _whole("--k", k or n or "")
    if len(outputs) != len(inputs):
        raise ValueError(
            f"--n gives {len(outputs)} matrices and --k {len(inputs)}. Give as many of each."
        )
    return list(zip(outputs, inputs, strict=True))


def _about(device: Any) -> str:
    """The machine in words."""
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    level = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {level}, {threads} thread{'s' * (threads > 1)}"


def _base(device: Any) -> Device:
    """The device to refit.

    Raises:
        ValueError: If nothing is known of this GPU.
    """
    import torch

    from ...kernels.latency import FOLDER, Device, names

    if device.type == "cpu":
        cores = torch.get_num_threads()
        return Device.load("cpu").model_copy(update={"processors": cores})
    name = torch.cuda.get_device_name(device)
    found = Device.of(name)
    if found is None:
        raise ValueError(
            f"Nothing is known of {name!r}; there are {', '.join(names())}. Copy the file of the "
            f"one most like it in {FOLDER}, put in what its maker publishes and a glob on this "
            "name as 'matches'."
        )
    return found


def _table(rows: list[Row], about: str) -> Table:
    table = Table("matrix", "m", "bits", "µs", "× fp32", title=escape(about))
    for row in rows:
        table.add_row(
            f"{row.n} x {row.k}",
            str(row.m),
            "fp32" if row.bits == _FP32 else str(row.bits),
            f"{1e6 * row.seconds:,.1f}",
            f"{row.speedup_vs_fp32:.2f}",
            end_section=row.bits == _FP32,
        )
    return table


def _note(rows: list[Row]) -> str:
    """Why many vectors at a time are slower than float32 on a CPU; empty if they are not."""
    from ...kernels.cpu import FEW

    many = sorted(row.speedup_vs_fp32 for row in rows if row.bits != _FP32 and row.m > FEW)
    if not many or many[0] >= 1:
        return ""
    speed = " to ".join(dict.fromkeys(f"{speed:.2f}" for speed in (many[0], many[-1])))
    return (
        f"With more than {FEW} vectors at a time (prompts, evaluation) every call unpacks the "
        f"weights: {speed} times the speed of float32 here, for less memory."
    )


def _fit_table(device: Device, rows: list[Row]) -> Table:
    """How far the fitted model is from the timings it was fitted to."""
    from ...kernels.lab.bench import errors_of

    table = Table("m", "median error", "largest", title=f"Latency model {device.name}")
    errors = dict(enumerate(map(abs, errors_of(device, rows))))
    for m in sorted({row.m for row in rows}):
        found = sorted(errors[i] for i, row in enumerate(rows) if row.m == m)
        table.add_row(str(m), f"{found[len(found) // 2]:.1%}", f"{found[-1]:.1%}")
    return table

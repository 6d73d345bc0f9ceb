"""`bitplan kernels check`: compile, count and judge, for processors that need not be here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import options
from ..console import out
from ..lazy import verb

app = verb()


@app.command()
def check(
    arch: Annotated[
        str, typer.Option(help="Processors to compile for, comma-separated.")
    ] = "sm_80,sm_90,sm_100,gfx942",
    bits: Annotated[
        str,
        typer.Option(help="Widths, comma-separated; 2+3+4 is one launch that mixes them."),
    ] = "2,3,4,8,2+3+4",
    group: Annotated[
        int,
        typer.Option(
            "--group-size", "--group", help="Weights per scale: 32, 64 or 128; 0 for a whole row."
        ),
    ] = 128,
    zero: Annotated[
        str, typer.Option(help="Zero points: none (symmetric), code, half or table (codebook).")
    ] = "code",
    dtype: Annotated[str, typer.Option(help="Activations: fp16 or bf16.")] = "fp16",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens that one program computes; default 8, 16 on AMD.")
    ] = None,
    cell: Annotated[
        str, typer.Option(help="Rows x columns: 128x128, 64x128, 128x64 or 64x64.")
    ] = "128x128",
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also kernels written the usual way, which must fail."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the counters to this .json file.")
    ] = None,
    quiet: options.QuietOption = False,
) -> None:
    r"""Compile the decode kernel for processors that need not be here, count, and judge.

    The gate: no spills, b/8 bytes per weight in 16-byte loads, matrix instructions, no conversion
    from integer, no dequantized weight in shared memory, and few enough instructions per weight
    that memory stays the limit (vector instructions on AMD). Nothing runs: counts bound a run
    time, they do not give it. Exits with 1 if a kernel fails. Needs Triton, which comes with
    pip install 'bitplan\[kernels]'.
    """
    from ..._base.files import write_json
    from ..._base.progress import Reporter
    from ...kernels.gemm import require_triton
    from ...kernels.lab import check as static

    options.check_json(json_file, "--json", "counters.json")
    cases = static.parse_cases(arch, bits, group, zero, dtype, tokens, cell)
    require_triton()
    names = list(dict.fromkeys(case.arch for case in cases))
    total = len(cases) + (len(names) if controls else 0)
    found, failing = [], []
    with Reporter(quiet).bar("Compiling", total) as advance:
        for case in cases:
            found.append(static.check(case))
            advance(1)
        for name in names if controls else ():
            failing += static.controls(name)
            advance(1)
    out.print(_check_table([*found, *failing]))
    for result in [*found, *failing]:
        for violation in result.violations:
            text = f"{result.arch}, {result.name}: {violation}"
            out.print(text, highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, {"rows": [_row(result) for result in [*found, *failing]]})
    wrong = sum(not r.passed for r in found)
    missed = sum(r.passed for r in failing)
    if missed:
        out.print(f"{missed} controls passed: the gate misses what it must see.")
    out.print(f"{len(found) - wrong} of {len(found)} kernels pass the gate.", highlight=False)
    if wrong or missed:
        raise typer.Exit(1)


def _row(result: Any) -> dict[str, Any]:
    return asdict(result) | {"passed": result.passed}


def _check_table(results: list[Any]) -> Table:
    shown = Table("for", "kernel", title="Main loops; counts are per weight")
    for column in ("regs", "spills", "instr", "budget", "bytes", "MMA", "gate"):
        shown.add_column(column, justify="right", no_wrap=True)
    for result in results:
        whole = [result.arch, result.name]
        use = [str(result.registers), str(result.spills)]
        verdict = "pass" if result.passed else "[red]FAIL[/]"
        if len(result.loops) > 1:
            shown.add_row(*whole, *use, "", "", "", "", verdict)
            whole, use, verdict = ["", ""], ["", ""], ""
        for loop in result.loops:
            if len(result.loops) > 1:
                whole = ["", f"  {loop.bits} bit" if loop.bits else "  a loop"]
            shown.add_row(
                *whole,
                *use,
                f"{loop.issued:.2f}",
                f"{loop.budget:.2f}",
                f"{loop.weight_bytes:.4g}",
                str(loop.tensor_ops),
                verdict,
            )
    return shown

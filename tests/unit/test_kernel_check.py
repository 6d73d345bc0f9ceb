"""The static check: kernels compiled for processors that are not here pass, controls fail."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitplan.__main__ import app
from bitplan.kernels.lab.check import ARCHS, Case, check, controls, inspect, parse_cases
from bitplan.kernels.planes import Cell

triton = pytest.importorskip("triton", reason="the kernels need Triton")

# The most instructions per weight, of all or of vector ones on AMD.
MOST: dict[tuple[str, tuple[int, ...]], float] = {
    ("sm_80", (2,)): 1.7,
    ("sm_90", (3,)): 2.2,
    ("sm_100", (4,)): 1.8,
    ("gfx942", (4,)): 1.9,
}


@pytest.mark.parametrize(("arch", "bits"), MOST)
def test_decode_loops_pass_the_gate(arch: str, bits: tuple[int, ...]) -> None:
    result = check(Case(arch, bits))
    assert result.violations == ()
    (loop,) = result.loops
    assert loop.bits == bits[0] and loop.weight_bytes == bits[0] / 8
    assert loop.issued <= MOST[arch, bits]
    assert result.spills == 0 and loop.tensor_ops > 0


def test_a_mixed_launch_has_a_loop_per_width() -> None:
    result = check(Case("sm_80", (2, 4), zero="none"))
    assert [loop.bits for loop in result.loops] == [2, 4]
    assert result.violations == ()


def test_small_cells_load_sixteen_bytes_too() -> None:
    result = check(Case("sm_80", (4,), cell=Cell(64, 64), zero="none"))
    assert [loop.weight_bytes for loop in result.loops] == [0.5]
    assert result.violations == ()


def test_narrow_loads_fail_even_where_inputs_fill_the_gap() -> None:
    """64 lanes share 128 words: 8 bytes each, while 16-byte loads of x amount to 4 bits."""
    result = check(Case("gfx942", (4,), cell=Cell(64, 64), zero="none"))
    assert result.violations == ("a lane loads 8 bytes of a 64x64 cell at a time, not 16",)


def test_issuing_is_the_limit_of_two_bits_on_the_fastest_memory() -> None:
    result = check(Case("sm_100", (2,), zero="none"))
    assert len(result.violations) == 1 and "issuing, not memory" in result.violations[0]


def test_the_usual_kernels_fail() -> None:
    broadcast, planes = controls("sm_80")
    assert any("16-byte loads bring" in text for text in broadcast.violations)
    assert any("conversions from integer" in text for text in broadcast.violations)
    assert any("stores to shared memory" in text for text in broadcast.violations)
    assert planes.loops[0].weight_bytes == 3 / 8
    assert any("issuing, not memory" in text for text in planes.violations)


def test_spills_fail() -> None:
    """Two warps with 64 tokens each need more registers than there are."""
    import bitplan.kernels.lab.check as static

    case = Case("sm_80", (4,), tokens=64, zero="none")
    result = inspect(static._compile_case(case), "", "sm_80", (4,), 128 * 128, 2, 2 * 128 * 64)
    assert any("registers" in text or "spills" in text for text in result.violations)


POINTERS = {
    "x": "*bf16",
    "sums": "*fp32",
    "ordered": "*bf16",
    "parts": "*fp32",
    "out": "*bf16",
    "bias": "*bf16",
    "words": "*i32",
    "scales": "*fp16",
    "zeros": "*u8",
    "cells": "*i32",
    "table": "*i32",
    "pairs": "*i32",
    "constants": "*i32",
    "targets": "*i32",
    "starts": "*i32",
    "columns": "*i32",
    "values": "*fp16",
    "down": "*bf16",
    "up": "*bf16",
}


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("plane_sums", {"SUM": 64, "AMD": False, "TOKENS": 16, "WIDE": False}),
        ("plane_sums", {"SUM": 64, "AMD": False, "TOKENS": 16, "WIDE": True}),
        (
            "plane_finish",
            {
                "BIAS": True,
                "SPARSE": True,
                "LOW_RANK": True,
                "ROWS": 64,
                "TOKENS": 16,
                "UPCAST": False,
            },
        ),
        (
            "plane_dequantize",
            {
                "BITS": (3,),
                "SUBS": (64,),
                "ZEROS": (1,),
                "ROWS": 64,
                "COLS": 64,
                "AMD": False,
                "TABLE": "fp16",
            },
        ),
        (  # as for one token: Triton makes arguments that are 1 constants
            "plane_gemm",
            {
                "BITS": (8,),
                "SUBS": (64,),
                "ZEROS": (2,),
                "ROWS": 64,
                "COLS": 64,
                "SUM": 64,
                "AMD": False,
                "TOKENS": 8,
                "STAGES": 1,
                "BIAS": True,
                "SCATTERED": False,
                "WIDE": True,
                "UPCAST": False,
                "M": 1,
                "sums_stride": 1,
                "splits": 1,
            },
        ),
        (  # some rows in one width, some in another
            "plane_gemm",
            {
                "BITS": (3, 4),
                "SUBS": (64, 64),
                "ZEROS": (1, 0),
                "ROWS": 64,
                "COLS": 64,
                "SUM": 64,
                "AMD": False,
                "TOKENS": 8,
                "STAGES": 2,
                "BIAS": True,
                "SCATTERED": True,
                "WIDE": False,
                "UPCAST": False,
            },
        ),
    ],
)
def test_the_compiler_takes_every_kernel(name: str, constants: dict[str, Any]) -> None:
    """The interpreter accepts more than the compiler does."""
    import triton.language as tl

    import bitplan.kernels.lab.check as static
    from bitplan.kernels import triton_kernels
    from bitplan.kernels.lab.disassembly import read

    kernel = getattr(triton_kernels, name)
    if "TABLE" in constants:
        constants = constants | {"TABLE": tl.float16}
    signature = {n: POINTERS.get(n, "i32") for n in kernel.arg_names}
    warps = 1 if name == "plane_gemm" else 4
    compiled = static._compile(kernel, signature, constants, "sm_80", warps, 3, ())
    assert read(compiled).spills == 0


def test_budget_is_what_the_processor_issues_while_it_reads() -> None:
    """108 processors of 128 lanes at 1.41 GHz, 4 bits from 2,039 GB/s."""
    assert ARCHS["sm_80"].budget(4) == pytest.approx(108 * 128 * 1.41 * 4 / 8 / 2039)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sm_70", "4"), "Unknown processor 'sm_70'. Known: sm_80"),
        (("sm_80", "9"), "Cannot read the widths '9'"),
        (("sm_80", "4+4"), "Cannot read the widths '4\\+4'"),
        (("sm_80", "4", 100), "Unknown group size '100'"),
        (("sm_80", "4", 128, "some"), "Unknown kind of zero point 'some'"),
        (("gfx942", "4", 128, "code", "fp16", 8), "gfx942 takes powers of two from 16"),
        (("sm_80", "8", 128, "table"), "at most 4 bits"),
    ],
)
def test_what_makes_no_sense(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cases(*arguments)


def test_interpreting_is_no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="Unset TRITON_INTERPRET"):
        check(Case("sm_80", (4,)))


def test_command(tmp_path: Path) -> None:
    """Exit code 1 when a kernel fails; the counters as JSON either way."""
    out = tmp_path / "check.json"
    command = [
        "kernels",
        "check",
        "--arch",
        "sm_80,sm_100",
        "--bits",
        "2",
        "--json",
        str(out),
        "-q",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "1 of 2 kernels pass the gate." in done.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["arch"], row["passed"]) for row in rows] == [("sm_80", True), ("sm_100", False)]
    assert rows[0]["loops"][0]["weight_bytes"] == 0.25

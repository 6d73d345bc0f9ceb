"""Static check of the decode kernel: compile it for a processor that is not here, and count.

The main loop is held against a gate: no spills, a matrix instruction, exactly b/8 bytes per weight
in 16-byte loads, no conversion from integer, no dequantized weight in shared memory, and few enough
instructions per weight to leave the memory the bottleneck.  Counts bound a run time, they do not
give it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..blocks import ZERO_KINDS, ZeroKind
from ..gemm import require_triton
from ..planes import CELLS, Cell

MAX_REGISTERS = {32: 128, 64: 256}  # per thread, by threads of a warp
BUDGET_SHARE = 0.9
_STORED = 0.1  # stores to shared memory per weight that are no dequantized weights
_POINTERS = {
    "x": "",
    "sums": "*fp32",
    "words": "*i32",
    "scales": "*fp16",
    "zeros": "*u8",
    "cells": "*i32",
    "table": "*i32",
    "pairs": "*i32",
    "constants": "*i32",
    "bias": "",
    "targets": "*i32",
    "out": "",
}
_NUMBERS = ("M", "N", "x_stride", "sums_stride", "excess_at", "splits")


class Arch(NamedTuple):
    """A processor: how to compile for it, and how fast it issues and reads.

    Attributes:
        backend: Triton's name of the family.
        target: Triton's name of the processor.
        warp: Threads of a warp.
        device: The product that the figures are of.
        lanes: Lanes that issue an instruction per cycle.
        clock_hz: Cycles per second, boosted.
        bytes_per_s: Bytes per second from memory.
    """

    backend: str
    target: int | str
    warp: int
    device: str
    lanes: int
    clock_hz: float
    bytes_per_s: float

    def budget(self, bits: float) -> float:
        """Thread instructions per weight at which issuing takes as long as reading b bits."""
        return self.lanes * self.clock_hz * bits / (8 * self.bytes_per_s)


ARCHS = {
    "sm_80": Arch("cuda", 80, 32, "A100 80 GB", 108 * 128, 1.41e9, 2039e9),
    "sm_90": Arch("cuda", 90, 32, "H100 SXM", 132 * 128, 1.755e9, 3352e9),
    "sm_100": Arch("cuda", 100, 32, "B200", 148 * 128, 1.85e9, 8000e9),
    "gfx942": Arch("hip", "gfx942", 64, "MI300X", 304 * 64, 2.1e9, 5300e9),
}


@dataclass(frozen=True, slots=True)
class Case:
    """What to compile.

    Attributes:
        arch: A name in ``ARCHS``.
        bits: The widths of the launch.
        group: Columns per scale.
        zero: Kind of zero point.
        dtype: ``fp16`` or ``bf16``.
        tokens: Tokens of a program; None for the least that the processor multiplies.
        cell: Shape of a cell.
        stages: Cells in flight; None for what ``choose_launch`` takes.
    """

    arch: str
    bits: tuple[int, ...]
    group: int = 128
    zero: ZeroKind = "code"
    dtype: str = "fp16"
    tokens: int | None = None
    cell: Cell = CELLS[0]
    stages: int | None = None


@dataclass(frozen=True, slots=True)
class LoopCheck:
    """The counters of the loop of one width, per weight.

    Attributes:
        bits: Width that its weight bytes amount to; None if they fit none.
        instructions: Thread instructions per weight, all of them.
        issued: Those that count against the issue budget.
        budget: Thread instructions per weight that the memory leaves time for.
        weight_bytes: Bytes of 16-byte loads of weights.
        global_bytes: Bytes of all global loads.
        tensor_ops: Matrix instructions per iteration.
        shared_stores: Stores to shared memory per weight.
        conversions: Conversions from integer per weight.
    """

    bits: int | None
    instructions: float
    issued: float
    budget: float
    weight_bytes: float
    global_bytes: float
    tensor_ops: int
    shared_stores: float
    conversions: float


@dataclass(frozen=True, slots=True)
class Check:
    """The counters of a kernel and what the gate says to them.

    Attributes:
        name: What was compiled.
        arch: For which processor.
        bits: The widths of the launch.
        registers: Registers of a thread.
        spills: Bytes and instructions of spilling.
        shared_bytes: Shared memory of a program.
        loops: Counters by loop.
        violations: What the gate objects to; empty if it passes.
    """

    name: str
    arch: str
    bits: tuple[int, ...]
    registers: int
    spills: int
    shared_bytes: int
    loops: tuple[LoopCheck, ...]
    violations: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the gate has no objection."""
        return not self.violations


def parse_cases(
    archs: str,
    bits: str,
    group: int = 128,
    zero: str = "code",
    dtype: str = "fp16",
    tokens: int | None = None,
    cell: str = "128x128",
) -> list[Case]:
    """The cases that a command names: processors and widths are separated by commas.

    Raises:
        ValueError: If a name is unknown or a number makes no sense.
    """
    cells = {f"{known.rows}x{known.cols}": known for known in CELLS}
    for what, given, known in (
        ("cell", cell, list(cells)),
        ("kind of zero point", zero, list(ZERO_KINDS)),
        ("kind of activation", dtype, ["fp16", "bf16"]),
        ("group size", str(group), ["0", "32", "64", "128", "256"]),
    ):
        if given not in known:
            raise ValueError(f"Unknown {what} {given!r}. Known: {', '.join(known)}.")
    kind = next(kind for kind in ZERO_KINDS if kind == zero)
    if kind == "table" and set(bits) & set("5678"):
        raise ValueError("Tables of values have codes of at most 4 bits.")
    cases = []
    for arch in archs.split(","):
        if arch not in ARCHS:
            raise ValueError(f"Unknown processor {arch!r}. Known: {', '.join(ARCHS)}.")
        least = _least_tokens(ARCHS[arch])
        if tokens is not None and (tokens < least or tokens & (tokens - 1)):
            raise ValueError(f"{tokens} tokens: {arch} takes powers of two from {least}.")
        for widths in bits.split(","):
            cases.append(Case(arch, _parse_widths(widths), group, kind, dtype, tokens, cells[cell]))
    return cases


def _parse_widths(text: str) -> tuple[int, ...]:
    parts = text.split("+")
    if not all(part in set("12345678") for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"Cannot read the widths {text!r}: numbers from 1 to 8 joined by +.")
    return tuple(sorted(map(int, parts)))


def check(case: Case) -> Check:
    """Compile the decode kernel and hold it against the gate.

    Raises:
        ValueError: If Triton is not installed, or interprets instead of compiling.
    """
    compiled = _compile_case(case)
    cell, arch = case.cell, ARCHS[case.arch]
    warps, inputs = _warps(arch, cell), 2 * cell.cols * (case.tokens or _least_tokens(arch))
    name = f"{'+'.join(map(str, case.bits))} bit"
    result = inspect(compiled, name, case.arch, case.bits, cell.rows * cell.cols, warps, inputs)
    each = 4 * cell.words // (warps * arch.warp)
    if each < 16:  # inputs of the same size could hide this from the counters
        narrow = f"a lane loads {each} bytes of a {cell.rows}x{cell.cols} cell at a time, not 16"
        result = replace(result, violations=(narrow, *result.violations))
    return result


def controls(arch: str) -> list[Check]:
    """The kernels that must fail: words loaded once per weight, and one plane per bit."""
    from .triton_controls import bit_plane_gemm, broadcast_gemm

    shared = {"x": "*fp16", "words": "*i32", "scales": "*fp16", "out": "*fp16"}
    sizes = {"M": "i32", "N": "i32", "K": "i32"}
    divisible = ("N", "K")
    naive = _compile(
        broadcast_gemm,
        shared | {"zeros": "*fp16"} | sizes,
        {"BITS": 4, "GROUP": 128, "TOKENS": 16, "ROWS": 64, "COLS": 128, "STAGES": 3},
        arch,
        4,
        3,
        divisible,
    )
    planes = _compile(
        bit_plane_gemm,
        shared | {"constants": "*i32"} | sizes,
        {"BITS": 3, "TOKENS": _least_tokens(ARCHS[arch]), "ROWS": 128, "STAGES": 3},
        arch,
        2,
        3,
        divisible,
    )
    return [
        inspect(naive, "word broadcast, 4 bit", arch, (4,), 64 * 128, 4, 2 * 128 * 16),
        inspect(
            planes,
            "bit planes, 3 bit",
            arch,
            (3,),
            128 * 128,
            2,
            2 * 128 * _least_tokens(ARCHS[arch]),
        ),
    ]


def inspect(
    kernel: Any,
    name: str,
    arch: str,
    bits: Sequence[int],
    weights: int,
    warps: int,
    input_bytes: int,
) -> Check:
    """Count a compiled kernel and hold it against the gate.

    Args:
        kernel: From ``triton.compile``.
        name: What it is.
        arch: A name in ``ARCHS``.
        bits: The widths of its loops.
        weights: Weights that a program handles per iteration.
        warps: Warps of a program.
        input_bytes: Bytes of activations that a program loads per iteration.
    """
    from .disassembly import read

    listing, device = read(kernel), ARCHS[arch]
    threads = warps * listing.lanes
    loops = []
    for loop in listing.loops:
        wide, inputs = loop.wide_bytes * threads / weights, input_bytes / weights
        exact = {8 * wide: wide, 8 * (wide - inputs): wide - inputs}
        width = next((int(value) for value in exact if value in bits), None)
        share = threads / weights
        loops.append(
            LoopCheck(
                width,
                loop.instructions * share,
                (loop.vector if device.backend == "hip" else loop.instructions) * share,
                device.budget(width or min(bits)),
                wide if width is None else width / 8,
                loop.global_bytes * share,
                loop.tensor,
                loop.stores * share,
                loop.conversions * share,
            )
        )
    loops.sort(key=lambda loop: loop.weight_bytes)
    violations = [*_violations(listing.registers, listing.spills, listing.lanes, loops, bits)]
    return Check(
        name,
        arch,
        tuple(bits),
        listing.registers,
        listing.spills,
        listing.shared_bytes,
        tuple(loops),
        tuple(violations),
    )


def _violations(
    registers: int, spills: int, warp: int, loops: Sequence[LoopCheck], bits: Sequence[int]
) -> list[str]:
    found = []
    if registers > MAX_REGISTERS[warp]:
        found.append(f"{registers} registers > {MAX_REGISTERS[warp]}")
    if spills:
        found.append(f"spills ({spills} B or accesses)")
    if not any(loop.tensor_ops for loop in loops):
        found.append("no matrix instruction in a loop")
    if sorted(loop.bits or 0 for loop in loops) != sorted(bits):
        got = ", ".join(f"{loop.weight_bytes:.4g}" for loop in loops)
        want = ", ".join(f"{b / 8:.4g}" for b in sorted(bits))
        found.append(f"16-byte loads bring {got} B per weight, not {want}")
    for loop in loops:
        name = f"{loop.bits} bit" if loop.bits else "a loop"
        if loop.issued > BUDGET_SHARE * loop.budget:
            found.append(
                f"{name}: {loop.issued:.2f} instructions per weight > {BUDGET_SHARE} x "
                f"{loop.budget:.2f}: issuing, not memory, is the limit"
            )
        if loop.conversions:
            found.append(f"{name}: {loop.conversions:.2f} conversions from integer per weight")
        if loop.shared_stores > _STORED:
            found.append(f"{name}: {loop.shared_stores:.2f} stores to shared memory per weight")
    return found


def _least_tokens(arch: Arch) -> int:
    return 16 if arch.backend == "hip" else 8


def _warps(arch: Arch, cell: Cell) -> int:
    return max(1, min(2, cell.words // 4 // arch.warp))


def _compile_case(case: Case) -> Any:
    arch, cell = ARCHS[case.arch], case.cell
    require_triton()
    from ..triton_kernels import plane_gemm
    from ..triton_launch import WIDE

    count = len(case.bits)
    sub = min(case.group or cell.cols, cell.cols)
    stages = case.stages or (1 if arch.backend == "hip" else 2)
    constants = {
        "BITS": case.bits,
        "SUBS": (sub,) * count,
        "ZEROS": (ZERO_KINDS.index(case.zero),) * count,
        "ROWS": cell.rows,
        "COLS": cell.cols,
        "SUM": sub,
        "AMD": arch.backend == "hip",
        "TOKENS": case.tokens or _least_tokens(arch),
        "STAGES": stages,
        "BIAS": False,
        "SCATTERED": False,
        "WIDE": WIDE and arch.backend == "cuda",
        "UPCAST": False,
    }
    signature = {name: kind or f"*{case.dtype}" for name, kind in _POINTERS.items()}
    signature |= dict.fromkeys(_NUMBERS, "i32")
    return _compile(
        plane_gemm,
        signature,
        constants,
        case.arch,
        _warps(arch, cell),
        2 * stages + 1,
        ("N", "x_stride"),
    )


def _compile(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    arch: str,
    warps: int,
    stages: int,
    divisible: Sequence[str],
) -> Any:
    """Compile for a processor that need not be here; pointers are aligned to 16 bytes."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("Triton interprets instead of compiling. Unset TRITON_INTERPRET.")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does, but it warns
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = [n for n in names if types[n].startswith("*") or n in divisible]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    device = ARCHS[arch]
    if device.backend == "cuda":
        options["enable_fp_fusion"] = True
    target = GPUTarget(device.backend, device.target, device.warp)
    return triton.compile(source, target=target, options=options)

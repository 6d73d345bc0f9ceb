"""The kernels for GPUs, without a GPU: instructions of the compiled loops, errors, packing.

Every width is compiled for every processor and counted (``kernels/check.py``); the kernels run in
Triton's interpreter against torch; the layers of SmolLM2-135M are laid out and timed.  The
interpreter needs a process of its own: this file is also that program.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitplan._base.progress import Reporter
from bitplan.benchmarks.search_lab import Part, Row, target
from bitplan.kernels.blocks import Block
from bitplan.kernels.lab.check import ARCHS, Check, check, controls, parse_cases
from bitplan.kernels.packing import PlanePack, resident_bytes
from bitplan.kernels.planes import ORDERS
from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import PackedTensor

WIDTHS = "1,2,3,4,5,6,7,8,2+3+4"
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("symmetric", {"zero": "none"}),
    ("float16 zeros", {"zero": "half"}),
    ("bfloat16", {"dtype": "bf16"}),
    ("groups of 64", {"group": 64}),
    ("16 tokens", {"tokens": 16}),
    ("64 x 64 cells", {"cell": "64x64"}),
    ("table of 16 values", {"zero": "table"}),
)
# Instructions per weight of other kernels, from the SASS of their own programs.
PEERS = {"gemlite, 4 bit, split-K": {"sm_80": 6.25, "sm_90": 6.69}, "Marlin": {"sm_80": 2.5}}
GOALS = {"2 bit": 1.7, "3 bit": 2.2, "4 bit": 1.8, "2+3+4 bit": 2.3}
LAYERS = {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}  # of SmolLM2-135M
SHAPES = ((70, 200), (130, 333), (1, 33), (192, 576))
GROUPS = ("32", "64", "128", "256", "c", "t")


def gpu_kernels(work: Path, reporter: Reporter) -> Part:
    """Compile, count and check; the interpreter; packing."""
    del work  # nothing here is worth keeping apart
    found, variants, failing = _compiled(reporter)
    errors = _interpreted(reporter)
    packing = _packing()
    loops = [(c, loop) for c in found for loop in c.loops]
    targets = [
        target(
            f"most instructions per weight, {name}, sm_80/90/100",
            f"<= {goal}",
            max(
                loop.instructions
                for c, loop in loops
                if c.name == name and c.arch.startswith("sm_")
            ),
        )
        for name, goal in GOALS.items()
    ]
    chosen = [c for c in found if c.name in GOALS]
    targets += [
        target(
            "bytes and instructions of spilling, these kernels",
            "<= 0",
            sum(c.spills for c in chosen),
        ),
        target(
            "conversions from integer, all widths", "<= 0", sum(v.conversions for _, v in loops)
        ),
        target(
            "difference of 16-byte weight loads from b/8 bytes per weight, all widths",
            "<= 0",
            max(abs(8 * v.weight_bytes - (v.bits or math.inf)) for _, v in loops),
        ),
        target("controls that pass the gate", "<= 0", sum(c.passed for c in failing)),
        target(
            "largest relative error, float32 results",
            "<= 1e-5",
            max(row["error fp32"] for row in errors),
        ),
        target(
            "largest relative error, float16 results",
            "<= 1e-3",
            max(row["error fp16"] for row in errors if row["activations"] == "fp16"),
        ),
    ]
    peers = [
        {"kernel": name, **{arch: by.get(arch) for arch in ARCHS}} for name, by in PEERS.items()
    ]
    return Part(
        {
            "GPU kernels, compiled: main loop of the decode kernel": [
                row for c in found for row in _rows(c)
            ],
            "GPU kernels, compiled: variants at 4 bits": variants,
            "GPU kernels, compiled: controls, which must fail": [
                row for c in failing for row in _rows(c)
            ],
            "Instructions per weight of other kernels": peers,
            "GPU kernels in Triton's interpreter against torch": errors,
            "PlanePack of the 210 layers of SmolLM2-135M": packing,
        },
        targets,
        [
            "Nothing on this page ran on a GPU (gpu.md did). Compiled: Triton's own compilers, "
            "groups of 128, packed zero points, float16, 8 tokens (16 on AMD), 128 x 128 cells "
            "unless the row says otherwise; "
            "instructions are thread instructions per weight (on AMD vector instructions, all of "
            "them in brackets). The budget is what the processor issues while its memory brings a "
            "weight. The gate is described in docs/kernels.md.",
            "Errors: largest error over the largest output, over all groups, shapes "
            f"{', '.join(f'{r} x {c}' for r, c in SHAPES)}, both orders of words and 1 and 3 "
            "splits in turn.",
            "Other kernels: gemlite's own split-K configuration and Marlin's loop for 16 tokens, "
            "compiled and counted the same way (Marlin's span by hand).",
        ],
    )


def _compiled(reporter: Reporter) -> tuple[list[Check], list[Row], list[Check]]:
    archs = ",".join(ARCHS)
    cases = parse_cases(archs, WIDTHS)
    extra = [(name, case) for name, some in VARIANTS for case in parse_cases(archs, "4", **some)]
    found, variants, failing = [], [], []
    with reporter.bar("Compiling", len(cases) + len(extra) + len(ARCHS)) as advance:
        for case in cases:
            found.append(check(case))
            advance(1)
        for name, case in extra:
            variants += [{"variant": name, **row} for row in _rows(check(case))]
            advance(1)
        for arch in ARCHS:
            failing += controls(arch)
            advance(1)
    return found, variants, failing


def _rows(result: Check) -> list[Row]:
    return [
        {
            "processor": result.arch,
            "kernel": result.name,
            "loop": loop.bits,
            "registers": result.registers,
            "spills": result.spills,
            "shared_bytes": result.shared_bytes,
            "instructions": f"{loop.issued:.2f}"
            + ("" if loop.issued == loop.instructions else f" ({loop.instructions:.2f})"),
            "budget": round(loop.budget, 2),
            "weight_bytes": loop.weight_bytes,
            "matrix_ops": loop.tensor_ops,
            "shared_stores": round(loop.shared_stores, 3),
            "gate": "pass" if result.passed else "fail",
        }
        for loop in result.loops
    ]


def _packing() -> list[Row]:
    """Seconds to lay out all layers, and how the bytes grow."""
    rows = []
    for spec in ("int2-g64", "int3-g64-asym", "int4-g64-asym", "int8-g128"):
        fmt = Format.parse(spec)
        stored = sum(n * fmt.stored_bytes(shape) for shape, n in LAYERS.items())
        resident = sum(n * resident_bytes(fmt, shape) for shape, n in LAYERS.items())
        for order in ORDERS:
            seconds = 0.0
            for shape, count in LAYERS.items():
                packed = _random(fmt, shape)
                times = []
                for _ in range(5):
                    start = time.perf_counter()
                    PlanePack.from_packed(packed, order)
                    times.append(time.perf_counter() - start)
                seconds += count * min(times)
            rows.append(
                {
                    "format": spec,
                    "order": order,
                    "seconds": round(seconds, 2),
                    "stored_mb": stored / 1e6,
                    "resident_mb": resident / 1e6,
                    "resident / stored": resident / stored,
                }
            )
    return rows


def _random(fmt: Format, shape: tuple[int, int]) -> PackedTensor:
    parts: dict[str, Tensor] = {}
    for name, (size, dtype) in fmt.tensors(shape).items():
        if dtype == "uint8":
            parts[name] = torch.randint(256, size, dtype=torch.uint8)
        else:
            parts[name] = ((torch.rand(size) - 0.2) / 64).half()
    return PackedTensor(fmt, shape, parts)


def _interpreted(reporter: Reporter) -> list[Row]:
    """Run this file as a program where Triton interprets."""
    reporter.say("The kernels in Triton's interpreter, some minutes")
    done = subprocess.run(
        [sys.executable, "-m", "bitplan.benchmarks.kernels_gpu"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[Row] = json.loads(done.stdout)
    return rows


def sweep() -> list[Row]:
    """Errors of all widths, groups, shapes, orders and splits; needs the interpreter."""
    from bitplan.kernels.triton_launch import Extras, Launch, multiply

    torch.manual_seed(0)
    rows = []
    for bits, dtype in itertools.product([*range(1, 9), 0], (torch.float16, torch.bfloat16)):
        worst = {torch.float32: 0.0, dtype: 0.0}
        layouts = itertools.product(GROUPS, ORDERS)
        for i, (group, order) in enumerate(layouts):
            shape = SHAPES[(bits + i) % len(SHAPES)]
            blocks, plain = _weight(bits, group, shape)
            rows_cols = (plain.shape[0], plain.shape[1])
            pack = PlanePack.from_blocks(blocks, rows_cols, order)
            for splits, out in ((1 + 2 * (i // 2 % 2), torch.float32), (1, dtype)):
                x = torch.randn(5, plain.shape[1]).to(dtype)
                launch = Launch(8 if order == "nvidia" else 16, 2, 1, splits)
                y = multiply(x, pack, None, Extras(), launch, out).double()
                expected = x.double() @ plain.double().T
                error = float((y - expected).abs().max() / expected.abs().max())
                worst[out] = max(worst[out], error)
        name = "fp16" if dtype == torch.float16 else "bf16"
        rows.append(
            {
                "bits": bits or "2+3+4+8",
                "activations": name,
                "error fp32": worst[torch.float32],
                "error fp16": worst[dtype] if name == "fp16" else None,
                "error bf16": worst[dtype] if name == "bf16" else None,
            }
        )
    return rows


def _weight(bits: int, group: str, shape: tuple[int, int]) -> tuple[list[Block], Tensor]:
    """A weight of one width, or (0) of four widths in its four quadrants."""
    if bits:
        spec = f"int{bits}-g{group}{'-asym' if bits % 2 else ''}"
        packed = _random(Format.parse(spec), shape)
        return [Block.of(packed)], packed.dequantize()
    whole, blocks = torch.zeros(64 + shape[0], 64 + shape[1]), []
    for width, row, col in ((2, 0, 0), (3, 0, 64), (4, 64, 0), (8, 64, 64)):
        size = (shape[0] if row else 64, shape[1] if col else 64)
        packed = _random(Format.parse(f"int{width}-g{group}{'-asym' if width % 2 else ''}"), size)
        whole[row : row + size[0], col : col + size[1]] = packed.dequantize()
        blocks.append(Block.of(packed, row, col))
    return blocks, whole


if __name__ == "__main__":
    print(json.dumps(sweep()))

"""Counting instructions in compiled kernels, without the processor they are for.

NVIDIA kernels are disassembled with the ``cuobjdump`` and ``nvdisasm`` that come with Triton; for
AMD Triton keeps the assembly text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
_SASS_LABEL = re.compile(r"^(\.L_\w+):")
_SASS_TARGET = re.compile(r"\((\.L_\w+)\)")
_RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
_GCN = re.compile(r"^\s+([a-z]\w+)\s*(.*)")
_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN_TARGET = re.compile(r"(\.LBB\w+)")
_GCN_LOAD = re.compile(
    r"(?:global|buffer)_load_(?:dword(?:x(\d))?|(?:[us](?:byte|short)|short)\w*)"
)

Instruction = tuple[str, str]  # name and operands


@dataclass(frozen=True, slots=True)
class Loop:
    """What one innermost loop that multiplies does, per thread and iteration.

    Attributes:
        instructions: All instructions.
        vector: Those that a lane executes (all of them on NVIDIA; no scalar ones on AMD).
        tensor: Matrix instructions.
        wide_bytes: Bytes of global loads of 16 bytes.
        global_bytes: Bytes of all global loads.
        stores: Stores to shared memory.
        store_bytes: Their bytes.
        conversions: Conversions from integer to float.
    """

    instructions: int
    vector: int
    tensor: int
    wide_bytes: int
    global_bytes: int
    stores: int
    store_bytes: int
    conversions: int


@dataclass(frozen=True, slots=True)
class Listing:
    """What a compiled kernel uses.

    Attributes:
        registers: Registers of a thread.
        spills: Bytes of stack and local memory, and instructions that access them.
        shared_bytes: Shared memory of a program.
        lanes: Threads of a warp.
        loops: The innermost loops that load and multiply, or all loops if there is none.
    """

    registers: int
    spills: int
    shared_bytes: int
    lanes: int
    loops: tuple[Loop, ...]


def read(kernel: Any) -> Listing:
    """Count what a kernel that ``triton.compile`` returned uses.

    Raises:
        RuntimeError: If a disassembler fails.
    """
    if "amdgcn" in kernel.asm:
        return _read_gcn(kernel.asm["amdgcn"], kernel.metadata.shared)
    return _read_sass(kernel.asm["cubin"], kernel.metadata.shared)


def _read_sass(cubin: bytes, shared: int) -> Listing:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        text = _run(knobs.nvidia.nvdisasm.path, "-c", str(path))
    resources = {name: int(number) for name, number in _RESOURCE.findall(usage)}
    parsed = _parse(text, _SASS, _SASS_LABEL, _SASS_TARGET, lambda name: name.startswith("BRA"))
    everything, loops = parsed
    accesses = sum(name.split(".")[0] in {"LDL", "STL"} for name, _ in everything)
    spills = resources.get("STACK", 0) + resources.get("LOCAL", 0) + accesses
    counted = tuple(map(_sass_loop, loops))
    return Listing(resources["REG"], spills, shared, 32, _multiplying(counted))


def _read_gcn(text: str, shared: int) -> Listing:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    _, loops = _parse(
        text, _GCN, _GCN_LABEL, _GCN_TARGET, lambda name: name.startswith(("s_cbranch", "s_branch"))
    )
    names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    spills = sum(map(field, names))
    registers = field("vgpr_count") + field("agpr_count")
    return Listing(registers, spills, shared, 64, _multiplying(tuple(map(_gcn_loop, loops))))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or 'no output'}")
    return done.stdout


def _parse(
    text: str,
    instruction: re.Pattern[str],
    label: re.Pattern[str],
    target: re.Pattern[str],
    jumps: Callable[[str], bool],
) -> tuple[list[Instruction], list[list[Instruction]]]:
    """All instructions, and those of every innermost loop: from the target of a backward jump."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := label.match(line):
            labels[match[1]] = len(found)
        elif match := instruction.match(line):
            found.append((match[1], match[2]))
    spans = []
    for at, (name, operands) in enumerate(found):
        if jumps(name) and (match := target.search(operands)) and labels.get(match[1], at) < at:
            spans.append((labels[match[1]], at + 1))
    inner = [
        span
        for span in spans
        if not any(o != span and o[0] >= span[0] and o[1] <= span[1] for o in spans)
    ]
    return found, [found[start:end] for start, end in inner]


def _multiplying(loops: Sequence[Loop]) -> tuple[Loop, ...]:
    """The loops that load operands and multiply; all loops if none does.

    A compiler may turn parts of a pipeline's end into loops: these load no weights.
    """
    return tuple(loop for loop in loops if loop.tensor and loop.wide_bytes) or tuple(loops)


def _sass_loop(instructions: Sequence[Instruction]) -> Loop:
    counts: Counter[str] = Counter()
    for name, _ in instructions:
        base, *parts = name.split(".")
        size = next((int(part) // 8 for part in parts if part in {"64", "128"}), 4)
        size = next((int(part[1:]) // 8 for part in parts if part in _SMALL), size)
        if base in {"LDG", "LDGSTS"}:
            counts["global"] += size
            counts["wide"] += size if size == 16 else 0
        elif base == "STS":
            counts["stores"] += 1
            counts["store_bytes"] += size
        counts["tensor"] += base.endswith("MMA") and base not in {"WARPSYNC"}
        counts["conversions"] += base in {"I2F", "I2FP"}
    total = len(instructions)
    return Loop(
        total,
        total,
        counts["tensor"],
        counts["wide"],
        counts["global"],
        counts["stores"],
        counts["store_bytes"],
        counts["conversions"],
    )


_SMALL = {"U8", "S8", "U16", "S16"}


def _gcn_loop(instructions: Sequence[Instruction]) -> Loop:
    counts: Counter[str] = Counter()
    for name, _ in instructions:
        matrix = "mfma" in name
        counts["tensor"] += matrix
        counts["vector"] += name.startswith("v_") and not matrix
        counts["conversions"] += name.startswith(("v_cvt_f32_i", "v_cvt_f32_u", "v_cvt_f16_"))
        if match := _GCN_LOAD.match(name):
            size = 4 * int(match[1] or 1) if "dword" in name else 1 if "byte" in name else 2
            counts["global"] += size
            counts["wide"] += size if size == 16 else 0
        elif name.startswith(("ds_write", "ds_store")):
            counts["stores"] += 1
            width = int(re.findall(r"_b(\d+)", name)[0]) // 8
            counts["store_bytes"] += width * (2 if "write2" in name or "store_2" in name else 1)
    return Loop(
        len(instructions),
        counts["vector"],
        counts["tensor"],
        counts["wide"],
        counts["global"],
        counts["stores"],
        counts["store_bytes"],
        counts["conversions"],
    )

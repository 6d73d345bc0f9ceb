"""Models in their files against models in memory: the same prices, in how much memory and time."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitplan.benchmarks.common import Row, write_results
from bitplan.models.checkpoint import streamed_bytes
from bitplan.sensitivity.table import SensitivityTable

FORMATS = "int2-g64-asym,int3-g64-asym,int4-g64-asym,int4-g128,int8-gc"
MODES = {"in memory": "1TiB", "in their files": "1MiB"}  # and --memory that makes them so

# Shapes of models with random weights, as the arguments of a LlamaConfig.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-0.5b": {
        "vocab_size": 49152,
        "hidden_size": 1280,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True, slots=True)
class Ran:
    """What a profile took.

    Attributes:
        table: The profile.
        peak: Bytes of memory that were resident at once.
        cpu: Seconds of all processors.
        wall: Seconds.
    """

    table: SensitivityTable
    peak: int
    cpu: float
    wall: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", action="append", default=[], help=f"smollm2, or a shape: {', '.join(SHAPES)}"
    )
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--rounding", default="rtn")
    parser.add_argument("--work", type=Path, help="folder that is kept, for models and profiles")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        rows = [
            row
            for name in given.model or ["smollm2"]
            for row in compared(name, work, given.sequences, given.rounding)
        ]
    write(rows, given.sequences, given.rounding)


def write(rows: list[Row], sequences: int, rounding: str, command: str | None = None) -> None:
    """Write the results, with what they are."""
    write_results(
        "scale",
        "Models that stay in their files, gone through block by block, against models in memory",
        rows=rows,
        notes=[
            f"`bitplan profile` on a CPU in a process of its own: {sequences} sequences of 128 "
            f"tokens of prose, batches of 768, rounding {rounding}, formats {FORMATS}; "
            "checkpoints in bfloat16. Peak is the largest resident set, pages of files included; "
            "`of float32` is its share of the weights in float32. Seconds are those of the "
            "processor, as the machine did other work; `cpu ratio` and `peak ratio` are against "
            "the model in memory, `largest difference` that of any price, relative.",
        ],
        command=command,
    )


def compared(name: str, work: Path, sequences: int, rounding: str) -> list[Row]:
    """A profile of a model in memory and one of it in its files."""
    folder = checkpoint(name, work)
    size = streamed_bytes(folder)
    found: dict[str, Ran] = {}
    for mode, memory in MODES.items():
        run = work / f"{name}-{mode.replace(' ', '-')}"
        found[mode] = profiled(folder, run, memory, sequences, rounding)
    return rows_of(name, size, found)


def rows_of(name: str, size: int, found: Mapping[str, Ran]) -> list[Row]:
    """The rows of a model whose weights take ``size`` bytes in float32."""
    first = next(iter(found.values()))
    return [
        {
            "model": name,
            "weights": mode,
            "float32 MiB": size / 2**20,
            "peak MiB": ran.peak / 2**20,
            "of float32": ran.peak / size,
            "peak ratio": ran.peak / first.peak,
            "cpu s": ran.cpu,
            "cpu ratio": ran.cpu / first.cpu,
            "largest difference": float(np.abs(ran.table.kl / first.table.kl - 1).max()),
        }
        for mode, ran in found.items()
    ]


def checkpoint(name: str, work: Path) -> Path:
    """A folder of bfloat16 weights, made where it is not there."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from bitplan.models.load import load_model

    folder = work / name
    if (folder / "config.json").is_file():
        return folder
    known = load_model("smollm2", "cpu")
    torch.manual_seed(0)
    config: Any = LlamaConfig(**SHAPES[name]) if name in SHAPES else known.module.config
    if hasattr(config, "quantization_config"):  # how the file it came in was stored
        del config.quantization_config
    module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if name not in SHAPES:
        module.load_state_dict(known.module.state_dict())
    module.save_pretrained(folder)
    tokenizer: Any = known.workload.tokenizer
    tokenizer.save_pretrained(folder)
    return folder


def profiled(folder: Path, run: Path, memory: str, sequences: int, rounding: str) -> Ran:
    """A profile in a process of its own."""
    profile = run / "profile.safetensors"
    profile.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bitplan", "profile", str(folder), "--out", str(run)]
    command += ["--memory", memory, "--sequences", str(sequences), "--rounding", rounding]
    command += ["--rounding-sequences", str(sequences), "--formats", FORMATS, "--device", "cpu"]
    command += ["--calibration", "prose"]  # the mixture has text that the model itself writes
    start = os.times().elapsed
    process = subprocess.Popen([*command, "--quiet"])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    wall = os.times().elapsed - start
    table = SensitivityTable.load(profile)
    return Ran(table, used.ru_maxrss * 1024, used.ru_utime + used.ru_stime, wall)


if __name__ == "__main__":
    main()

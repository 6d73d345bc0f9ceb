"""Kernels: products and a whole model on the CPU, counters of compiled GPU code, predicted times.

Parts that were measured before are kept in the work folder, so ``--only`` measures one anew and
``results/kernels.{json,md}`` always holds all that are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bitplan._base.files import write_json
from bitplan._base.progress import Reporter
from bitplan.benchmarks.common import RESULTS, write_results
from bitplan.benchmarks.kernels_cpu import cpu_kernels
from bitplan.benchmarks.kernels_gpu import gpu_kernels
from bitplan.benchmarks.kernels_latency import latency_model
from bitplan.benchmarks.search_lab import Part

PARTS: dict[str, Callable[[Path, Reporter], Part]] = {
    "cpu": cpu_kernels,
    "gpu": gpu_kernels,
    "latency": latency_model,
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/bench-kernels"),
        help="folder for the packed model and for parts that are done",
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable")
    parser.add_argument("--out", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    reporter = Reporter()
    for name in options.only or PARTS:
        part = PARTS[name](options.work, reporter)
        write_json(options.work / "parts" / f"{name}.json", asdict(part))
        write(options.work, options.out)


def write(work: Path, out: Path) -> None:
    """Merge all parts that are there into one JSON and one page."""
    parts = [
        Part(**json.loads(path.read_text(encoding="utf-8")))
        for name in PARTS
        if (path := work / "parts" / f"{name}.json").exists()
    ]
    tables = {heading: rows for part in parts for heading, rows in part.tables.items()}
    write_results(
        "kernels",
        "Kernels: speed, accuracy and memory",
        tables={"Targets": [row for part in parts for row in part.targets]} | tables,
        notes=[note for part in parts for note in part.notes],
        command="python benchmarks/bench_kernels.py",
        out=out,
    )


if __name__ == "__main__":
    main()

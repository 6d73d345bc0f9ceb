"""The search engine on SmolLM2-135M: rival scores, refinement, equal work, and large tables.

Needs WikiText-2 as plain text (``valid.txt`` to calibrate, ``test.txt`` to measure) in
``DATA/wikitext-2``. Takes hours on two cores. Every piece that takes long is kept in the work
folder at once: killed at any point, the same command goes on there. Writes
``results/search.{json,md}`` and ``results/search_work.png`` from all parts that are there.
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
from bitplan.benchmarks.search_fused import fused
from bitplan.benchmarks.search_heldout import heldout
from bitplan.benchmarks.search_lab import BUDGETS, LENGTH, Lab, Part, Settings
from bitplan.benchmarks.search_refine import refinement
from bitplan.benchmarks.search_rivals import rivals
from bitplan.benchmarks.search_scale import scale
from bitplan.benchmarks.search_work import TABLE, draw_work, equal_work

ON_MODEL: dict[str, Callable[[Lab], Part]] = {
    "rivals": rivals,
    "heldout": heldout,
    "fused": fused,
    "refine": refinement,
    "work": equal_work,
}
PARTS = (*ON_MODEL, "scale")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/bench-search"),
        help="folder for what took long; delete it to start over",
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable")
    parser.add_argument("--model", default="smollm2", help=argparse.SUPPRESS)
    parser.add_argument("--sequences", type=int, default=96, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds of the scores")
    parser.add_argument("--tokens", type=int, default=16384, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    reporter = Reporter()
    chosen = options.only or PARTS

    def finish(name: str, part: Part) -> None:
        write_json(_path(options.work, name), asdict(part))
        write(options.work, options.out, options.sequences, options.tokens)

    if "scale" in chosen and (options.only or not _path(options.work, "scale").exists()):
        finish("scale", scale(reporter))
    if set(chosen) & set(ON_MODEL):
        settings = Settings(
            options.data,
            options.work,
            options.model,
            options.sequences,
            options.tokens,
            options.seeds,
        )
        lab = Lab(settings, reporter)
        for name in filter(chosen.__contains__, ON_MODEL):
            finish(name, ON_MODEL[name](lab))


def write(work: Path, out: Path, sequences: int, tokens: int) -> None:
    """Merge all parts that are there into one JSON, one page and the plot."""
    parts = [
        Part(**json.loads(path.read_text(encoding="utf-8")))
        for name in PARTS
        if (path := _path(work, name)).exists()
    ]
    tables = {heading: rows for part in parts for heading, rows in part.tables.items()}
    notes = [note for part in parts for note in part.notes]
    write_results(
        "search",
        "SmolLM2-135M: scores, refinement on true KL, equal work, and large tables",
        tables={"Targets": [row for part in parts for row in part.targets]} | tables,
        notes=[
            *notes,
            f"Calibration: {sequences} x {LENGTH} tokens of WikiText-2 valid. Measured on "
            f"{tokens:,} tokens of WikiText-2 test, sequences of {LENGTH}, the files as they are "
            "(word-level, `<unk>`). KL is KL(original || quantized), nats per token. Uniform "
            "formats for comparison: "
            + ", ".join(f"{name} at {budget}" for budget, name in BUDGETS.items())
            + ".",
        ],
        command="python benchmarks/bench_search.py --data DATA",
        out=out,
    )
    if TABLE in tables:
        draw_work(tables[TABLE], out / "search_work.png")


def _path(work: Path, part: str) -> Path:
    return work / "parts" / f"{part}.json"


if __name__ == "__main__":
    main()

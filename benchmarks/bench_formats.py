"""What formats lose of normal weights, against the least that as many bits allow.

Rounded to nearest on scales with the least squared error.  With ``--run``, the folder of a profile
of some layers, also what formats cost there: prices in nats per token, as curvature predicts.
Writes ``results/formats.{json,md}``.  Minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from bitplan import SensitivityTable
from bitplan.benchmarks.common import RESULTS, Row, write_results
from bitplan.quantizers.format import Format
from bitplan.reports.format_menu import SHOWN, Facts, normal

SHAPE = (4096, 4096)  # that bits are counted for


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a profile with these formats")
    parser.add_argument("--out", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sample = normal()
    found = [Facts.of(Format.parse(name), SHAPE, sample) for name in SHOWN]
    rows = [
        {
            "format": facts.fmt.name,
            "bits per weight": facts.bits,
            "relative squared error": facts.error,
            "x bound": facts.of_bound,
            "CPU": facts.cpu,
            "GPU": facts.gpu,
        }
        for facts in sorted(found, key=lambda facts: facts.bits)
    ]
    tables = {} if options.run is None else {"Some layers of SmolLM2-135M": layers(options.run)}
    write_results(
        "formats",
        "What formats lose of normal weights",
        rows=rows,
        tables=tables,
        notes=[
            f"Bits of a matrix {SHAPE}; errors of {sample.shape[0]} x "
            f"{sample.shape[1]} normal weights, rounded to nearest on scales with the least "
            "squared error; `x bound` is the error times 4^bits. Of layers: the prices of a "
            "profile, rounded by fisher_gptq and summed over the layers, in nats per token.",
        ],
        out=options.out,
    )


def layers(run: Path) -> list[Row]:
    """Prices of every format, summed over the units of a profile."""
    table = SensitivityTable.load(run / "profile.safetensors")
    weights = sum(unit.weights for unit in table.units)
    rows = []
    for f, name in enumerate(table.formats):
        fmt = Format.parse(name)
        if fmt.floating:
            continue
        bits = 8 * float(np.sum(table.bytes[:, f])) / weights
        loss = float(np.sum(table.kl[:, f]))
        rows.append({"format": name, "bpw": bits, "price": loss, "price x 4^bpw": loss * 4**bits})
    return sorted(rows, key=lambda row: row["bpw"])


if __name__ == "__main__":
    main()

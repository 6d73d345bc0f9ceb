"""Which calibration texts generalize: rounding on their evidence, KL on texts of several kinds."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from bitplan.benchmarks.common import Row, write_results
from bitplan.models.find import find_units
from bitplan.models.load import load_model
from bitplan.models.measure import measure, plan_runner, standard_error
from bitplan.models.names import LANGUAGES
from bitplan.models.samples import Samples, calibration_samples, evaluation_samples
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.sensitivity.evidence import calibrated

LENGTH = 128
MEASURED_AT_ONCE = 4096  # tokens
OTHER_SEED = 987_654  # of the languages measured on: other sequences than those calibrated on
TEXTS = {
    "prose": "prose",
    "shipped": "prose:0.5,code:0.3,chat:0.2",
    "mixture": "mixture",
    "more of self": "prose:0.3,code:0.25,chat:0.1,languages:0.1,self:0.25",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="holds wikitext-2/test.txt")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--format", default="int3-g64-asym")
    parser.add_argument("--rounding", default="gptq")
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=3072, help="to measure on, of each text")
    given = parser.parse_args()
    model = load_model(given.model)
    units = find_units(model.module, exclude=("*embed*", "lm_head"))
    formats = {name: Format.parse(given.format) for unit in units for name in unit.modules}
    runs = {}
    for name, text in TEXTS.items():
        samples = calibration_samples(model, text, given.sequences, LENGTH)
        renderer = calibrated(model, units, given.rounding, samples, model_sha256="")
        renderer.store.complete(formats.items())
        runs[name] = plan_runner(model, renderer, formats)
    rows: list[Row] = []
    for text, held_out in kinds(model, given.data, given.tokens).items():
        found, _ = measure(model, runs, held_out)
        row: dict[str, str | float] = {"measured on": text}
        for name, result in found.items():
            row[name] = result.mean_kl
            change = result.kl - found["prose"].kl
            row[f"{name}: change"] = float(np.mean(change)) / found["prose"].mean_kl
            row[f"± of {name}"] = standard_error(change) / found["prose"].mean_kl
        rows.append(row)
    write_results(
        "texts",
        f"Rounding to {given.format} by {given.rounding} on several calibration texts",
        rows=rows,
        notes=[
            f"KL in nats per token on {given.tokens:,} tokens of each text, every matrix but the "
            f"embedding in one format; evidence from {given.sequences} sequences of {LENGTH}. "
            "Changes are against prose, paired over sequences. "
            + "; ".join(f"{name}: {text}" for name, text in TEXTS.items())
            + ".",
        ],
    )


def kinds(model: LoadedModel, data: Path, tokens: int) -> dict[str, Samples]:
    """Held-out sequences of every kind of text."""
    texts = {name: name for name in ("prose", "code", "chat")}
    texts["wikitext"] = str(data / "wikitext-2" / "test.txt")
    found = {
        name: evaluation_samples(model, text, tokens, LENGTH, MEASURED_AT_ONCE)
        for name, text in texts.items()
    }
    written = calibration_samples(
        model, LANGUAGES, tokens // LENGTH, LENGTH, OTHER_SEED, MEASURED_AT_ONCE
    )
    return found | {LANGUAGES: written}


if __name__ == "__main__":
    main()

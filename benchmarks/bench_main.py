"""The main job on SmolLM2-135M: predictions, plans against uniform ones, and what it costs.

Needs WikiText-2 as plain text (``valid.txt`` to calibrate, ``test.txt`` to measure) in
``DATA/wikitext-2``. Takes about 20 minutes on two cores; writes ``results/main.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitplan._base.progress import Reporter
from bitplan.benchmarks.common import write_results
from bitplan.models.find import find_units
from bitplan.models.load import load_model
from bitplan.models.measure import Measurement, measure, plan_runner
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, calibration_samples, evaluation_samples
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.candidates import DEFAULT_FORMATS
from bitplan.quantizers.format import Format
from bitplan.search.plan import Plan
from bitplan.search.solve import solve
from bitplan.sensitivity.estimate import profile
from bitplan.sensitivity.table import SensitivityTable

LAYERS = ["model.layers.*"]
BUDGETS = {"4.3bpw": "int4-g64-asym", "3.28bpw": "int3-g64-asym"}
UNIFORM = [f"int{bits}-g64-asym" for bits in (2, 3, 4, 5, 6, 8)]
SEQUENCES, LENGTH, TOKENS = 96, 128, 16384


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--profile-only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile_only:
        profile_and_report_memory(options.data, options.profile_only)
        return
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "profile.safetensors"
        command = [sys.executable, __file__, "--data", str(options.data)]
        done = subprocess.run(
            [*command, "--profile-only", str(saved)], check=True, stdout=subprocess.PIPE, text=True
        )
        cost = json.loads(done.stdout.splitlines()[-1])
        table = SensitivityTable.load(saved)
    model = load_model("smollm2", "cpu")
    samples = evaluation_samples(
        model, str(options.data / "wikitext-2" / "test.txt"), TOKENS, LENGTH
    )
    plans = {budget: solve(table, budget) for budget in BUDGETS}
    rows, results = validation_rows(model, table, plans, samples)
    figures: dict[str, Any] = {}
    for budget, uniform in BUDGETS.items():
        plan = plans[budget]
        ratio = results[budget].mean_kl / results[uniform].mean_kl
        figures[f"{budget}: measured KL / uniform {uniform}"] = ratio
        figures[f"{budget}: gap to the lower bound"] = plan.gap
        other = solve(table, budget, solver="ilp").predicted_kl
        figures[f"{budget}: objective relative to CBC's, minus 1"] = plan.predicted_kl / other - 1
    figures |= cost | rounding_cost(model)
    figures |= probe_variance(model, options.data)
    write_results(
        "main",
        "SmolLM2-135M: predicted and measured KL, plans and uniform formats",
        rows=rows,
        figures=figures,
        notes=[
            f"Units: the 210 linear layers ({table.weights:,} weights). Calibration: {SEQUENCES} x "
            f"{LENGTH} tokens of WikiText-2 valid, seed 0. Measured on {TOKENS:,} tokens of "
            "WikiText-2 test, sequences of 128, the files as they are (word-level, `<unk>`).",
            "KL is KL(original || quantized), nats per token. Costs are ratios within one run.",
        ],
        command="python benchmarks/bench_main.py --data DATA",
    )


def profile_and_report_memory(data: Path, path: Path) -> None:
    """Profile in a process of its own; print time ratio and peak memory as JSON."""
    model = load_model("smollm2", "cpu")
    samples = _calibration(model, data)
    start = time.perf_counter()
    table = profile(model, samples, DEFAULT_FORMATS, include=LAYERS, reporter=Reporter())
    elapsed = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    table.save(path)
    size = 4 * sum(p.numel() for p in model.module.parameters())
    plain = plain_training_pass(model, samples)
    result = {
        "profiling time / plain forward + backward": elapsed / plain,
        "profiling seconds": elapsed,
        "plain forward + backward seconds": plain,
        "peak memory of profiling, GB": peak / 1e9,
        "allowed (3 x float32 weights + 1.5 GB), GB": (3 * size + 1.5e9) / 1e9,
    }
    print(json.dumps(result))


def plain_training_pass(model: LoadedModel, samples: Samples) -> float:
    """Seconds of forward + backward with weight gradients over the calibration tokens."""
    model.module.requires_grad_(True)
    start = time.perf_counter()
    for batch in samples.batches:
        model.module(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        model.module.zero_grad()
    elapsed = time.perf_counter() - start
    model.module.requires_grad_(False)
    return elapsed


def validation_rows(
    model: LoadedModel, table: SensitivityTable, plans: dict[str, Plan], samples: Samples
) -> tuple[list[dict[str, Any]], dict[str, Measurement]]:
    """Measure uniform formats and plans on the same tokens."""
    renderer = Renderer(model.module, table.units)
    assignments = {name: dict.fromkeys(renderer.names, Format.parse(name)) for name in UNIFORM}
    for budget, plan in plans.items():
        assignments[budget] = {k: Format.parse(v) for k, v in plan.assignments.items()}
    runs = {name: plan_runner(model, renderer, a) for name, a in assignments.items()}
    with Reporter().bar("Measuring", len(samples.batches) * (1 + len(runs))) as advance:
        measured, ppl = measure(model, runs, samples, lambda: advance(1))
    rows = []
    for name, result in measured.items():
        if name in plans:
            size, predicted = plans[name].bytes, plans[name].predicted_kl
            stderr = plans[name].predicted_kl_stderr
        else:
            column = table.formats.index(name)
            size, predicted = table.uniform_bytes(name), float(table.kl[:, column].sum())
            assert table.scores is not None
            totals = (table.scores[:, :, column].astype(float) ** 2).sum(1)
            stderr = totals.std(ddof=1) / len(totals) ** 0.5
        rows.append(
            {
                "plan": f"plan at {name}" if name in plans else f"uniform {name}",
                "bpw": round(8 * size / table.weights, 4),
                "bytes": size,
                "predicted KL": predicted,
                "its stderr": stderr,
                "measured KL": result.mean_kl,
                "± stderr": result.kl_stderr,
                "predicted / measured": predicted / result.mean_kl,
                "perplexity": result.perplexity,
                "original perplexity": ppl,
            }
        )
    return sorted(rows, key=lambda row: row["bytes"]), measured


def rounding_cost(model: LoadedModel) -> dict[str, float]:
    """Time to fit and encode all layers at 4 bits, over a forward pass of 4 x 2,048 tokens."""
    units = find_units(model.module, include=LAYERS)
    fmt = Format.parse("int4-g64-asym")
    renderer = Renderer(model.module, units)
    start = time.perf_counter()
    for name in renderer.names:
        renderer.render(name, fmt)
    rounding = time.perf_counter() - start
    ids = torch.randint(1000, (4, 2048), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    with torch.no_grad():
        model.logits(ids)
    forward = time.perf_counter() - start
    return {
        "quantizing 210 layers to int4-g64-asym / forward of 4 x 2,048 tokens": rounding / forward
    }


def probe_variance(model: LoadedModel, data: Path) -> dict[str, float]:
    """Relative standard error of the two probes' prices at equal cost, averaged over units."""
    samples = calibration_samples(
        model, str(data / "wikitext-2" / "valid.txt"), sequences=48, length=LENGTH
    )
    figures = {}
    for metric in ("fisher", "fisher_gaussian"):
        table = profile(
            model, samples, ("int4-g64-asym",), metric=metric, include=LAYERS, reporter=Reporter()
        )
        relative = float(np.median(table.stderr / table.kl))
        figures[f"{metric}: median relative stderr of a price, 48 sequences"] = relative
    return figures


def _calibration(model: LoadedModel, data: Path) -> Samples:
    return calibration_samples(
        model, str(data / "wikitext-2" / "valid.txt"), SEQUENCES, LENGTH, seed=0
    )


if __name__ == "__main__":
    main()

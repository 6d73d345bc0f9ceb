"""Rounding in the loop on SmolLM2-135M: plans priced and shipped with the weights they measure.

For every calibration seed one profile, and a search at every budget that takes it: the plan as
solved, with its scales tuned, and refined.  Needs WikiText-2 as plain text (``valid.txt`` to
calibrate, ``test.txt`` to measure) in ``DATA/wikitext-2``.  Hours on two cores; every figure is
kept in the work folder: killed at any point, the same command goes on there.  Writes
``results/rounding.{json,md}`` from all searches that are there.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bitplan._base.files import write_json
from bitplan._base.progress import Reporter
from bitplan.benchmarks.common import RESULTS, origin, write_results
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.quantizers.candidates import DEFAULT_FORMATS

BUDGETS = ("4.3bpw", "3.28bpw", "3.0bpw", "2.5bpw")
LAYERS = "model.layers.*"  # linear layers; the embedding stays as it is
TUNED = 200  # steps
TRELLIS = ("tcq2", "tcq3", "tcq4", *(f"int{bits}-g64-asym" for bits in (4, 5, 6, 8)))
GPU_TOKENS = 3072  # per pass, where small ones leave a GPU idle


@dataclass(frozen=True)
class Variant:
    """One way to search.

    Attributes:
        name: In the table.
        rounding: The rounding method.
        tune: Steps of tuning the scales.
        refine: Most steps of refinement.
        sequential: Whether the plan is rounded again, block by block.
        formats: The candidates, if not those by default; they have a profile of their own.
    """

    name: str
    rounding: str = "fisher_gptq"
    tune: int = 0
    refine: int = 0
    sequential: bool = False
    formats: tuple[str, ...] = DEFAULT_FORMATS

    def folder(self, seed: int) -> str:
        """The run folder of a seed."""
        menu = "" if self.formats == DEFAULT_FORMATS else "-trellis"
        return f"{self.rounding}{menu}-{seed}"


VARIANTS = (
    Variant("to nearest", "rtn"),
    Variant("gptq", "gptq"),
    Variant("fisher_gptq"),
    Variant(f"fisher_gptq, {TUNED} steps of tuning", tune=TUNED),
    Variant("fisher_gptq, refined", refine=3),
    Variant("fisher_gptq, rounded again", sequential=True),
    Variant("fisher_gptq, trellis codes", formats=TRELLIS),
)


@dataclass(frozen=True)
class Found:
    """One search: KL in nats per token, memory in bytes, time in seconds of all processors.

    Attributes:
        cpu: Of all processors' cores, seconds.
        seconds: As on a clock.
        device: What it ran on.
        uniform_difference: KL of the uniform rival minus the plan's, on the rival's tokens.
        uniform_tokens: Tokens that the rival was measured on; fewer where it fell far behind.
    """

    variant: str
    budget: str
    seed: int
    bytes: int
    bpw: float
    predicted: float
    kl: float
    kl_stderr: float
    also: float | None
    uniform: str
    uniform_kl: float
    cpu: float
    peak: int
    seconds: float | None = None
    device: str = "cpu"
    uniform_difference: float | None = None
    uniform_tokens: int | None = None

    @property
    def of_uniform(self) -> float | None:
        """The plan's KL over the rival's, both on the rival's tokens; None if not known."""
        if self.uniform_difference is None:
            return None
        return 1 - self.uniform_difference / self.uniform_kl


@dataclass(frozen=True)
class Where:
    """What a search runs on.

    Attributes:
        model: The model.
        device: ``cpu`` or ``cuda``.
        data: Folder of the texts.
        work: Folder of everything that is kept.
    """

    model: str
    device: str
    data: Path
    work: Path

    def described(self) -> str:
        """The device by its name."""
        return torch.cuda.get_device_name() if self.device.startswith("cuda") else self.device


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-rounding"))
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument("--seed", type=int, action="append", help="one of them; repeatable")
    parser.add_argument("--model", default="smollm2", help="the same model, as a folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", action="append", help="a variant; repeatable")
    parser.add_argument("--budget", action="append", choices=BUDGETS, help="repeatable")
    parser.add_argument("--tokens", type=int, default=16384, help="test tokens")
    parser.add_argument("--out", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [v for v in VARIANTS if not options.only or v.name in options.only]
    where = Where(options.model, options.device, options.data, options.work)
    for seed in options.seed or range(options.seeds):
        for variant in chosen:
            for budget in options.budget or BUDGETS:
                search(variant, budget, seed, options.tokens, where)
                write(options.work, options.out, options.tokens)
    write(options.work, options.out, options.tokens)


def search(variant: Variant, budget: str, seed: int, tokens: int, where: Where) -> None:
    """Run one search, unless its figures are there."""
    path = where.work / "found" / f"{variant.name}-{budget}-{seed}.json"
    if path.exists():
        return
    text = where.data / "wikitext-2"
    profile = ProfileSettings(
        where.model,
        rounding=variant.rounding,
        formats=variant.formats,
        calibration=str(text / "valid.txt"),
        include=(LAYERS,),
        seed=seed,
        device=where.device,
    )
    if where.device != "cpu":
        profile = replace(profile, batch_tokens=GPU_TOKENS)
    goal = SearchSettings(
        budget=budget,
        evaluation=str(text / "test.txt"),
        eval_tokens=tokens,
        refine=variant.refine,
        tune=variant.tune,
        sequential=variant.sequential,
        bootstrap=0,
    )
    cpu, clock = time.process_time(), time.perf_counter()
    plan = run_search(profile, goal, where.work / variant.folder(seed), Reporter())
    measured = plan.measured
    assert measured is not None
    best = min((b for b in plan.baselines if b.format), key=lambda b: abs(b.bytes - plan.bytes))
    found = Found(
        variant=variant.name,
        budget=budget,
        seed=seed,
        bytes=plan.bytes,
        bpw=plan.bpw,
        predicted=plan.predicted_kl,
        kl=measured.kl,
        kl_stderr=measured.kl_stderr,
        also=plan.measured_also[0].kl if plan.measured_also else None,
        uniform=str(best.format),
        uniform_kl=best.kl,
        cpu=time.process_time() - cpu,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        seconds=time.perf_counter() - clock,
        device=where.described(),
        uniform_difference=best.difference,
        uniform_tokens=best.tokens or measured.tokens,
    )
    write_json(where.work / "origin.json", origin())
    write_json(path, asdict(found))


def all_found(work: Path) -> Iterator[Found]:
    """Every search that has ended."""
    for path in sorted((work / "found").glob("*.json")):
        yield Found(**json.loads(path.read_text(encoding="utf-8")))


def write(work: Path, out: Path, tokens: int) -> None:
    """Means over the seeds, and every search.

    Versions and machine are those of the last search (``origin.json``), whoever writes the page;
    further notes are the lines of ``notes.txt`` in the work folder, if there is one.
    """
    everything = list(all_found(work))
    rows = []
    for budget in BUDGETS:
        for variant in VARIANTS:
            some = [f for f in everything if (f.variant, f.budget) == (variant.name, budget)]
            if not some:
                continue
            kl = np.array([f.kl for f in some])
            also = [f.also for f in some]
            rows.append(
                {
                    "budget": budget,
                    "variant": variant.name,
                    "seeds": len(some),
                    "KL": float(kl.mean()),
                    "± over seeds": float(kl.std(ddof=1)) if len(kl) > 1 else None,
                    "± over text": float(np.mean([f.kl_stderr for f in some])),
                    "predicted / measured": float(np.mean([f.predicted / f.kl for f in some])),
                    "of the nearest uniform": _mean_or_none([f.of_uniform for f in some]),
                    "KL on code": _mean_or_none(also),
                    "bpw": float(np.mean([f.bpw for f in some])),
                }
            )
    notes = [
        f"KL(original || plan) in nats per token on {tokens:,} tokens of WikiText-2 test; "
        "calibrated on WikiText-2 valid, linear layers only. The nearest uniform format is the one "
        "nearest in bytes, rounded by the same method; it may take a few more. `of the nearest "
        "uniform` is the KL of the plan over its KL, both on the tokens that it was measured on, "
        "which are fewer where it fell far behind; `uniform_kl` is on these. A dash "
        "stands where a search did not record them. `cpu` and `seconds` are what a search took, "
        "with its profile where it made one.",
    ]
    devices = sorted({f.device for f in everything})
    notes += [f"Ran on {', '.join(devices)}."] if devices else []
    if (more := work / "notes.txt").exists():
        notes += more.read_text(encoding="utf-8").splitlines()
    made = work / "origin.json"
    write_results(
        "rounding",
        "SmolLM2-135M: rounding in the loop",
        rows=rows,
        tables={"Every search": [asdict(f) for f in everything]},
        notes=notes,
        command="python benchmarks/bench_rounding.py --data DATA",
        made=json.loads(made.read_text(encoding="utf-8")) if made.exists() else None,
        out=out,
    )


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None unless all are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


if __name__ == "__main__":
    main()

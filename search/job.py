"""A search job: profile, solve, validate, report. The one place that wires a model to solvers.

Every stage leaves a complete file in the run's folder before the next begins, so a run that was
interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from ..quantizers.files import write_json
from ..quantizers.format import Format, resolve_formats
from ..quantizers.methods import METHODS
from ..sensitivity.calibration import (
    BUILTIN,
    Samples,
    calibration_samples,
    evaluation_samples,
)
from ..sensitivity.evaluate import Measurement, Run, measure, plan_runner
from ..sensitivity.metrics import METRICS
from ..sensitivity.models import LoadedModel, load_model
from ..sensitivity.profile import DEFAULT_FORMATS, price, provenance
from ..sensitivity.progress import Reporter
from ..sensitivity.rendering import Renderer
from ..sensitivity.table import PROFILE_FILE, SensitivityTable, UnitInfo, stored_bytes
from ..sensitivity.units import find_units
from .budget import Budget
from .frontier import Frontier
from .materialize import assignment_formats, is_packed, load_packed, planned_units
from .plan import PLAN_FILE, Baseline, Measured, Plan
from .problem import Problem
from .solve import plan_from_choice, solve
from .solvers import SOLVERS

FRONTIER_FILE = "frontier.json"
MEASUREMENTS_FILE = "measurements.json"
REPORT_FILES = ("report.html", "frontier.png", "allocation.png", "sensitivity.png")


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """Everything that determines a sensitivity table."""

    model: str
    formats: tuple[str, ...] = DEFAULT_FORMATS
    metric: str = "fisher"
    rounding: str = "rtn"
    calibration: str = BUILTIN
    sequences: int = 96
    length: int = 128
    batch_tokens: int = 768
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """A budget, how to solve for it and what to validate on."""

    budget: str
    solver: str = "certified"
    pins: Mapping[str, str] | None = None
    evaluation: str = BUILTIN
    eval_tokens: int = 16384
    command: str | None = None


def run_profile(settings: ProfileSettings, run: Path, reporter: Reporter) -> SensitivityTable:
    """Profile a model into a run folder, or take the finished profile that is there.

    Raises:
        ValueError: If a name is unknown, or the folder holds a profile made with other settings.
    """
    return _profile_stage(_prepare(settings, reporter), run, reporter)


def run_search(
    settings: ProfileSettings, search: SearchSettings, run: Path, reporter: Reporter
) -> Plan:
    """The main job: profile, solve, validate against every uniform plan, save.

    Whatever can be checked without the slow profile is checked before it.

    Returns:
        The plan that measured best among the solver's and every uniform plan that fits the same
        bytes; the others are its baselines.

    Raises:
        ValueError: On bad input; nothing is left half-written.
    """
    budget = Budget.parse(search.budget)
    SOLVERS.get(search.solver)
    work = _prepare(settings, reporter)
    blank = work.blank_table()
    Problem.from_table(blank, search.pins).check_feasible(
        budget.resolve(blank.weights, blank.provenance["outside_bytes"])
    )
    if work.model.is_language_model and _is_same_text(search.evaluation, settings.calibration):
        raise ValueError(
            f"{search.evaluation} is both --calibration and --eval: a plan measured on the text it "
            "was made from proves nothing. Give another text to one of them."
        )
    samples = evaluation_samples(work.model, search.evaluation, search.eval_tokens, settings.length)

    table = _profile_stage(work, run, reporter)
    plan = solve(
        table,
        budget,
        solver=search.solver,
        pins=search.pins,
        seed=settings.seed,
        command=search.command,
    )
    problem = Problem.from_table(table, search.pins)
    plan = validate(plan, table, problem, work.model, samples, run / MEASUREMENTS_FILE, reporter)
    for stale in REPORT_FILES:  # of an earlier plan in this folder
        (run / stale).unlink(missing_ok=True)
    Frontier.from_problem(problem, plan.model).save(run / FRONTIER_FILE)
    plan.save(run / PLAN_FILE)
    return plan


def _is_same_text(first: str, second: str) -> bool:
    files = [Path(name) for name in (first, second)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


@dataclass(frozen=True, slots=True)
class _Work:
    """A loaded model, what is asked of it, and what that will be recorded as."""

    model: LoadedModel
    units: tuple[UnitInfo, ...]
    formats: tuple[Format, ...]
    samples: Samples
    provenance: dict[str, Any]

    def blank_table(self) -> SensitivityTable:
        """The table with exact bytes and no prices."""
        shape = (len(self.units), len(self.formats))
        return SensitivityTable(
            units=self.units,
            formats=tuple(fmt.name for fmt in self.formats),
            bytes=stored_bytes(self.units, self.formats),
            kl=np.zeros(shape),
            stderr=np.zeros(shape),
            provenance=self.provenance,
        )


def _prepare(settings: ProfileSettings, reporter: Reporter) -> _Work:
    METRICS.get(settings.metric)  # unknown names fail before the model is loaded
    METHODS.get(settings.rounding)
    resolve_formats(settings.formats, "float32")
    reporter.say(f"Loading {settings.model}")
    model = load_model(settings.model, settings.device)
    units = find_units(model.module, settings.include, settings.exclude, settings.groups)
    samples = calibration_samples(
        model,
        settings.calibration,
        settings.sequences,
        settings.length,
        settings.seed,
        settings.batch_tokens,
    )
    inside = sum(unit.weights for unit in units)
    everything = sum(p.numel() for p in model.module.parameters())
    reporter.say(
        f"{len(units)} units with {inside:,} weights; the other {everything - inside:,} "
        "parameters stay as they are"
    )
    if model.is_language_model:
        error = (2 / samples.count) ** 0.5
        reporter.say(f"{samples.count} calibration sequences: each price errs by about {error:.0%}")
    return _Work(
        model,
        units,
        resolve_formats(settings.formats, model.source_dtype),
        samples,
        provenance(model, units, samples, settings.metric, settings.rounding, settings.seed),
    )


def _profile_stage(work: _Work, run: Path, reporter: Reporter) -> SensitivityTable:
    path = run / PROFILE_FILE
    if path.exists():
        table = SensitivityTable.load(path)
        _check_same(table, work.blank_table(), path)
        if not path.with_suffix(".json").exists():  # the disk was full
            table.save(path)
        reporter.say(f"Profile found in {path}, not computed again")
        return table
    run.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=run):
        pass  # a folder that cannot be written is found out before the slow part
    table = price(work.model, work.units, work.formats, work.samples, work.provenance, reporter)
    table.save(path)
    return table


def _check_same(found: SensitivityTable, asked: SensitivityTable, path: Path) -> None:
    """Raise if a finished profile was made with other settings than those asked for."""
    before = {"units": [u.name for u in found.units], "formats": list(found.formats)}
    now = {"units": [u.name for u in asked.units], "formats": list(asked.formats)}
    before |= _flat(found.provenance)
    now |= _flat(asked.provenance)
    for key, value in now.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} was made with other settings ({key}: {_short(before.get(key))}, now "
                f"{_short(value)}). Choose another --out, or delete that file to profile again."
            )


def _flat(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance by dotted key, without what does not change a price."""
    flat: dict[str, Any] = {}
    for key, value in provenance.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): entry for name, entry in inner.items()}
    return {k: v for k, v in flat.items() if not k.startswith("versions") and k != "model.id"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def validate(
    plan: Plan,
    table: SensitivityTable,
    problem: Problem,
    model: LoadedModel,
    samples: Samples,
    cache: Path,
    reporter: Reporter,
) -> Plan:
    """Measure a plan and its uniform rivals on held-out sequences, paired, and pick the best.

    Rivals are all uniform plans within the plan's budget, and for reference the next larger one.

    Returns:
        The plan with the least measured KL among those within the budget, with ``measured`` and
        ``baselines`` filled in.
    """
    rivals = _uniform_plans(plan, table, problem)
    plans = {f"{plan.solver} plan": plan} | rivals
    measured, ppl_original = _measure_plans(plans, model, table, samples, cache, reporter)
    fitting = [name for name, p in plans.items() if p.bytes <= plan.budget.bytes]
    best = min(fitting, key=lambda name: measured[name].mean_kl)
    winner, result = plans[best], measured[best]
    return winner.model_copy(
        update={
            "measured": Measured(
                kl=result.mean_kl,
                kl_stderr=result.kl_stderr,
                ppl=result.perplexity,
                ppl_original=ppl_original,
                tokens=result.tokens,
                length=samples.length,
                text=samples.source,
                text_sha256=samples.sha256,
            ),
            "baselines": [
                _baseline(name, plans[name], measured[name], result)
                for name in plans
                if name != best
            ],
        }
    )


def run_eval(
    target: Path, text: str, tokens: int | None, device: str, reporter: Reporter
) -> tuple[Plan, Measurement, float | None]:
    """Measure a plan, or the packed model in a folder, against the original model.

    Args:
        target: A plan.json, a run folder, or a folder written by ``bitplan quantize``.
        text: Held-out text: ``builtin`` or a file.
        tokens: Tokens to measure on; None for as many as the plan was measured on.
        device: ``cpu``, ``cuda`` or ``auto``.
        reporter: Where progress is shown.

    Returns:
        The plan, the measurement, and the original's perplexity (None without text).

    Raises:
        ValueError: If the target is neither, or does not match the model.
    """
    packed = is_packed(target)
    plan = Plan.load(target / PLAN_FILE if target.is_dir() else target)
    reporter.say(f"Loading {plan.model.id}")
    model = load_model(plan.model.id, device)
    units = planned_units(model.module, plan)
    if packed:
        run: Run = load_packed(target, device).logits
    else:
        renderer = Renderer(model.module, units, plan.rounding)
        run = plan_runner(model, renderer, assignment_formats(plan))
    before = plan.measured
    samples = evaluation_samples(
        model,
        text,
        tokens or (before.tokens if before else 16384),
        (before.length if before else None) or plan.calibration.get("length") or 128,
    )
    with reporter.bar("Measuring", 2 * len(samples.batches)) as advance:
        measured, ppl = measure(model, {"plan": run}, samples, lambda: advance(1))
    return plan, measured["plan"], ppl


def _uniform_plans(plan: Plan, table: SensitivityTable, problem: Problem) -> dict[str, Plan]:
    """Uniform plans within the budget and the smallest one above it, by name."""
    plans = {
        f"uniform {name}": plan_from_choice(
            table,
            choice,
            "uniform",
            lower_bound=plan.lower_bound_kl,
            budget=plan.budget,
            command=plan.command,
        )
        for f, name in enumerate(table.formats)
        if (choice := problem.uniform_choice(f)) is not None
    }
    larger = sorted(p.bytes for p in plans.values() if p.bytes > plan.budget.bytes)
    limit = larger[0] if larger else plan.budget.bytes
    return {
        name: p
        for name, p in plans.items()
        if p.bytes <= limit and p.assignments != plan.assignments
    }


def _measure_plans(
    plans: Mapping[str, Plan],
    model: LoadedModel,
    table: SensitivityTable,
    samples: Samples,
    cache: Path,
    reporter: Reporter,
) -> tuple[dict[str, Measurement], float | None]:
    """Measure plans, taking those already measured on the same text from ``cache``."""
    known = _read_measurements(cache, samples)
    keys = {name: _plan_key(plan) for name, plan in plans.items()}
    todo = {name: plans[name] for name, key in keys.items() if key not in known["plans"]}
    if todo:
        renderer = Renderer(model.module, table.units, next(iter(plans.values())).rounding)
        runs = {
            name: plan_runner(model, renderer, assignment_formats(p)) for name, p in todo.items()
        }
        steps = len(samples.batches) * (1 + len(runs))
        with reporter.bar(f"Validating {len(runs)} plans", steps) as advance:
            fresh, known["ppl_original"] = measure(model, runs, samples, lambda: advance(1))
        for name, m in fresh.items():
            known["plans"][keys[name]] = {
                "kl": m.kl.tolist(),
                "nll": None if m.nll is None else m.nll.tolist(),
                "tokens": m.tokens,
            }
        write_json(cache, known)
    measured = {name: _measurement(known["plans"][key]) for name, key in keys.items()}
    return measured, known["ppl_original"]


def _read_measurements(cache: Path, samples: Samples) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(cache.read_text(encoding="utf-8"))
        if known["text_sha256"] == samples.sha256:
            return known
    except (OSError, ValueError, KeyError):
        pass  # not there yet, or damaged: measured again
    return {"text_sha256": samples.sha256, "ppl_original": None, "plans": {}}


def _measurement(entry: dict[str, Any]) -> Measurement:
    nll = None if entry["nll"] is None else np.array(entry["nll"])
    return Measurement(np.array(entry["kl"]), nll, entry["tokens"])


def _plan_key(plan: Plan) -> str:
    parts = [plan.model.sha256, plan.rounding, sorted(plan.assignments.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _baseline(name: str, plan: Plan, measured: Measurement, shipped: Measurement) -> Baseline:
    difference, stderr = measured.minus(shipped)
    return Baseline(
        name=name,
        bytes=plan.bytes,
        predicted_kl=plan.predicted_kl,
        kl=measured.mean_kl,
        kl_stderr=measured.kl_stderr,
        ppl=measured.perplexity,
        difference=difference,
        difference_stderr=stderr,
    )

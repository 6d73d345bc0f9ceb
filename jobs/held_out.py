"""Measure plans on held-out text, remember every figure, and ship the best that fits."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._base.progress import Reporter
from ..models.kv_cache import kv_runner
from ..models.load import check_model, load_model
from ..models.measure import Chooser, Measurement, Run, measure, plan_runner, standard_error
from ..models.rendering import Renderer
from ..models.samples import Samples, evaluation_samples
from ..models.streamed import is_streamed
from ..models.texts import check_text
from ..models.together import measure_together
from ..models.workload import LoadedModel
from ..search.goals import Goal
from ..search.plan import Baseline, KVCache, Measured, MeasuredAlso, Plan, plan_key
from .folder import RunFolder, plan_path
from .folding import folded
from .materialize import assignment_formats, is_packed, load_packed, planned_units
from .measurements import Figures, Measurements
from .renderings import plan_renderer
from .tuned import tuned_renderer

BEHIND = 5.0  # paired standard errors: further behind, a plan is not measured on
ENOUGH = 8  # sequences to say so


class HeldOut:
    """Held-out sequences, and what was measured on them in a run folder.

    Args:
        model: The original model.
        renderer: Renders its matrices, by the rounding method of the plans.
        samples: The sequences.
        run: The run folder: every figure is kept there.
        reporter: Where progress is shown.
        file: Where figures are kept; by default those of the first held-out text.
    """

    def __init__(
        self,
        model: LoadedModel,
        renderer: Renderer,
        samples: Samples,
        run: RunFolder,
        reporter: Reporter,
        file: Path | None = None,
    ) -> None:
        self.samples = samples
        self._model, self._reporter = model, reporter
        self._renderer, self._run = renderer, run
        self._file = file or run.measurements
        origin = renderer.store.origin
        codes = hashlib.sha256(origin.encode()).hexdigest() if origin else ""
        self._known = Measurements.of(self._file, samples.sha256, codes)

    @property
    def ppl_original(self) -> float | None:
        """Perplexity of the original; None before a measurement or without text."""
        return self._known.ppl_original

    def measure(
        self, plans: Mapping[str, Plan], keep: Chooser | None = None
    ) -> dict[str, Measurement]:
        """Measure the plans that were not measured before; the figures of all of them.

        Args:
            plans: The plans by name.
            keep: Says which to go on with while they are measured, see :func:`.measure.measure`;
                by default all are measured on all sequences.
        """
        keys = {name: plan_key(plan) for name, plan in plans.items()}
        todo = {name: plans[name] for name, key in keys.items() if not self._knows(key, keep)}
        if todo:
            runs = {
                name: plan_run(self._model, self._renderer_of(plan), plan)
                for name, plan in todo.items()
            }
            steps = len(self.samples.batches) * (1 + len(runs))
            what = next(iter(runs)) if len(runs) == 1 else f"{len(runs)} plans"
            together = is_streamed(self._model.module) and not any(
                plan.kv_cache for plan in todo.values()
            )
            with self._reporter.bar(f"Validating {what}", steps) as advance:
                if together:
                    assigned = {
                        name: (self._renderer_of(plan), assignment_formats(plan))
                        for name, plan in todo.items()
                    }
                    fresh, self._known.ppl_original = measure_together(
                        self._model, assigned, self.samples, lambda: advance(1), keep
                    )
                else:
                    fresh, self._known.ppl_original = measure(
                        self._model, runs, self.samples, lambda: advance(1), keep=keep
                    )
            for name, m in fresh.items():
                self._known.plans[keys[name]] = Figures(
                    kl=m.kl.tolist(),
                    nll=None if m.nll is None else m.nll.tolist(),
                    tokens=m.tokens,
                )
            self._known.write(self._file)
        return {name: _measurement(self._known.plans[key]) for name, key in keys.items()}

    def _knows(self, key: str, keep: Chooser | None) -> bool:
        """Whether a plan was measured before, on all sequences where that is asked for."""
        known = self._known.plans.get(key)
        return known is not None and (keep is not None or len(known.kl) == self.samples.count)

    def _contest(self, plans: Mapping[str, Plan]) -> dict[str, Measurement]:
        """Measure plans of which the best is wanted: those far behind on some sequences only."""
        fitting = {name for name, plan in plans.items() if plan.total_bytes <= plan.budget.bytes}
        measured = self.measure(plans, keep=lambda kl: in_the_running(kl, fitting))
        while True:
            shortest = min(len(m.kl) for m in measured.values())
            seen = {name: m.kl[:shortest] for name, m in measured.items()}
            running = in_the_running(seen, fitting)
            short = [n for n in running if len(measured[n].kl) < self.samples.count]
            if not short:  # the best by all sequences is one of those that have them
                return measured
            measured |= self.measure({name: plans[name] for name in short})

    def best(
        self, plans: Mapping[str, Plan], goal: Goal, uniform: Mapping[str, str] | None = None
    ) -> Plan:
        """Measure all plans on the same tokens and take the best of those that fit.

        Args:
            plans: The plans by name.
            goal: What is asked for.
            uniform: Names of the plans that have one format -> that format.

        Returns:
            The plan with the least measured KL among those within their budget; where the goal is
            a quality, the smallest (or fastest) one that reaches it. With ``measured`` filled in
            and all others as ``baselines``.
        """
        measured = self.measure(plans) if goal.is_target else self._contest(plans)
        kl = {n: float(np.nan_to_num(m.mean_kl, nan=np.inf)) for n, m in measured.items()}
        answers = [name for name, plan in plans.items() if goal.accepts(plan, kl[name])]
        if goal.is_target and answers:
            best = min(answers, key=lambda name: (goal.size_of(plans[name]), kl[name]))
        else:  # no plan may reach a quality that the one found was measured to reach on its own
            fitting = [n for n, plan in plans.items() if plan.total_bytes <= plan.budget.bytes]
            best = min(answers or fitting, key=kl.__getitem__)
        result = measured[best]
        return plans[best].model_copy(
            update={
                "measured": Measured(**self._record(result)),
                "codes_sha256": self._renderer_of(plans[best]).store.digest(
                    assignment_formats(plans[best])
                ),
                "baselines": [
                    _baseline(name, plans[name], measured[name], result, (uniform or {}).get(name))
                    for name in plans
                    if name != best
                ],
            }
        )

    def _renderer_of(self, plan: Plan) -> Renderer:
        return tuned_renderer(self._renderer, plan, self._run)

    def beside(self, plan: Plan, rivals: Mapping[str, Plan]) -> MeasuredAlso:
        """Measure a plan here that was chosen elsewhere, and the best of its uniform rivals.

        Args:
            plan: The plan, with its baselines.
            rivals: All of them, by name; taken is the one with the least KL among those that have
                one format and fit.
        """
        fitting = [b for b in plan.baselines if b.format and b.bytes <= plan.budget.bytes]
        best = min(fitting, key=lambda b: float(np.nan_to_num(b.kl, nan=np.inf)), default=None)
        if best is None:
            return MeasuredAlso(**self._record(self.measure({"the plan": plan})["the plan"]))
        ours, theirs = self.measure({"the plan": plan, best.name: rivals[best.name]}).values()
        difference, stderr = theirs.minus(ours)
        return MeasuredAlso(
            **self._record(ours),
            rival=best.format,
            rival_kl=theirs.mean_kl,
            rival_kl_stderr=theirs.kl_stderr,
            difference=difference,
            difference_stderr=stderr,
        )

    def _record(self, found: Measurement) -> dict[str, Any]:
        """What a plan keeps of a measurement."""
        return {
            "kl": found.mean_kl,
            "kl_stderr": found.kl_stderr,
            "ppl": found.perplexity,
            "ppl_original": self.ppl_original,
            "tokens": found.tokens,
            "length": self.samples.length,
            "text": self.samples.source,
            "text_sha256": self.samples.sha256,
        }


def plan_run(model: LoadedModel, renderer: Renderer, plan: Plan) -> Run:
    """The model with weights, and KV cache if planned, as a plan says."""
    return with_cache(model, plan_runner(model, renderer, assignment_formats(plan)), plan.kv_cache)


def with_cache(model: LoadedModel, run: Run, cache: KVCache | None) -> Run:
    """A run with the KV cache held in a plan's widths."""
    if cache is None:
        return run
    return kv_runner(model, dict(enumerate(cache.bits.values())), run)


def run_eval(
    target: Path, text: str, tokens: int | None, device: str, reporter: Reporter
) -> tuple[Plan, Measurement, float | None]:
    """Measure a plan, or the packed model in a folder, against the original model.

    Args:
        target: A plan.json, a run folder, or a folder written by ``bitplan quantize``.
        text: Held-out text: ``builtin``, ``code``, ``chat`` or a file.
        tokens: Tokens to measure on; None for as many as the plan was measured on.
        device: ``cpu``, ``cuda`` or ``auto``.
        reporter: Where progress is shown.

    Returns:
        The plan, the measurement, and the original's perplexity (None without text).

    Raises:
        ValueError: If the target is neither, or does not match the model.
    """
    packed = is_packed(target)
    plan = Plan.load(plan_path(target))
    original = plan.original()
    check_model(original, device)
    check_text(text, "evaluation")
    reporter.say(f"Loading {original}")
    model = load_model(original, device)
    beside = RunFolder.around(target)
    if not packed:
        folded(model.module, plan, beside)
    units = planned_units(model.module, plan, unfolded=packed)
    if packed:
        quantized = load_packed(target, device, torch.float32)
        run = with_cache(quantized, quantized.logits, plan.kv_cache)
    else:
        renderer = plan_renderer(plan, model, units, beside=beside, reporter=reporter)
        run = plan_run(model, renderer, plan)
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


def _measurement(figures: Figures) -> Measurement:
    nll = None if figures.nll is None else np.array(figures.nll)
    return Measurement(np.array(figures.kl), nll, figures.tokens)


def in_the_running(kl: Mapping[str, NDArray[np.float64]], fitting: Collection[str]) -> list[str]:
    """Plans that may still turn out the best, by their KL on the same sequences so far.

    Out of the running is who is behind the best of those that fit by :data:`BEHIND` standard
    errors, paired over at least :data:`ENOUGH` sequences.

    >>> kl = {"a": np.linspace(0, 1, 16), "b": np.linspace(1, 0.01, 16), "c": np.linspace(2, 3, 16)}
    >>> in_the_running(kl, "abc"), in_the_running(kl, "c")
    (['a', 'b'], ['a', 'b', 'c'])
    """
    able = [name for name in kl if name in fitting] or list(kl)
    best = kl[min(able, key=lambda name: float(np.nan_to_num(kl[name].mean(), nan=np.inf)))]
    if len(best) < ENOUGH:
        return list(kl)
    behind = {name: values - best for name, values in kl.items()}
    return [n for n, d in behind.items() if not d.mean() > BEHIND * standard_error(d)]


def _baseline(
    name: str, plan: Plan, measured: Measurement, shipped: Measurement, uniform: str | None
) -> Baseline:
    difference, stderr = measured.minus(shipped)
    short = measured.tokens < shipped.tokens
    return Baseline(
        name=name,
        format=uniform,
        bytes=plan.total_bytes,
        predicted_kl=plan.predicted_kl,
        kl=measured.mean_kl,
        kl_stderr=measured.kl_stderr,
        ppl=None if short else measured.perplexity,  # of other text
        tokens=measured.tokens if short else None,
        ms=plan.latency.ms if plan.latency else None,
        difference=difference,
        difference_stderr=stderr,
    )

"""Measure plans on held-out text, remember every figure, and ship the best that fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._base.files import write_json
from .._base.progress import Reporter
from ..models.kv_cache import kv_runner
from ..models.load import check_model, load_model
from ..models.measure import Measurement, Run, measure, plan_runner
from ..models.rendering import Renderer
from ..models.samples import Samples, check_text, evaluation_samples
from ..models.workload import LoadedModel
from ..search.plan import MEASUREMENTS_FILE, PLAN_FILE, Baseline, KVCache, Measured, Plan, plan_key
from .materialize import assignment_formats, is_packed, load_packed, planned_units
from .renderings import plan_renderer


class HeldOut:
    """Held-out sequences, and what was measured on them in a run folder.

    Args:
        model: The original model.
        renderer: Renders its matrices, by the rounding method of the plans.
        samples: The sequences.
        run: The run folder: every figure is kept in its measurements.json.
        reporter: Where progress is shown.
    """

    def __init__(
        self,
        model: LoadedModel,
        renderer: Renderer,
        samples: Samples,
        run: Path,
        reporter: Reporter,
    ) -> None:
        self.samples = samples
        self._model, self._cache, self._reporter = model, run / MEASUREMENTS_FILE, reporter
        self._renderer = renderer
        self._known = _read_measurements(self._cache, samples)

    @property
    def ppl_original(self) -> float | None:
        """Perplexity of the original; None before a measurement or without text."""
        ppl: float | None = self._known["ppl_original"]
        return ppl

    def measure(self, plans: Mapping[str, Plan]) -> dict[str, Measurement]:
        """Measure the plans that were not measured before; the figures of all of them."""
        keys = {name: plan_key(plan) for name, plan in plans.items()}
        todo = {name: plans[name] for name, key in keys.items() if key not in self._known["plans"]}
        if todo:
            runs = {name: plan_run(self._model, self._renderer, p) for name, p in todo.items()}
            steps = len(self.samples.batches) * (1 + len(runs))
            what = next(iter(runs)) if len(runs) == 1 else f"{len(runs)} plans"
            with self._reporter.bar(f"Validating {what}", steps) as advance:
                fresh, self._known["ppl_original"] = measure(
                    self._model, runs, self.samples, lambda: advance(1)
                )
            for name, m in fresh.items():
                self._known["plans"][keys[name]] = {
                    "kl": m.kl.tolist(),
                    "nll": None if m.nll is None else m.nll.tolist(),
                    "tokens": m.tokens,
                }
            write_json(self._cache, self._known)
        return {name: _measurement(self._known["plans"][key]) for name, key in keys.items()}

    def best(
        self,
        plans: Mapping[str, Plan],
        smallest_within: float | None = None,
        size: Callable[[Plan], float] = lambda plan: plan.total_bytes,
    ) -> Plan:
        """Measure all plans on the same tokens and take the best of those that fit.

        Args:
            plans: The plans by name.
            smallest_within: Take the smallest plan with at most this KL, nats per token.
            size: What the smallest plan has the least of.

        Returns:
            The plan with the least measured KL among those within their budget, with ``measured``
            filled in and all others as ``baselines``.
        """
        measured = self.measure(plans)
        fitting = [name for name, plan in plans.items() if plan.total_bytes <= plan.budget.bytes]
        kl = {name: np.nan_to_num(measured[name].mean_kl, nan=np.inf) for name in fitting}
        best = min(fitting, key=kl.__getitem__)
        if smallest_within is not None:
            reaching = [name for name in fitting if kl[name] <= smallest_within]
            best = min(reaching, key=lambda name: size(plans[name]), default=best)
        result = measured[best]
        return plans[best].model_copy(
            update={
                "measured": Measured(
                    kl=result.mean_kl,
                    kl_stderr=result.kl_stderr,
                    ppl=result.perplexity,
                    ppl_original=self.ppl_original,
                    tokens=result.tokens,
                    length=self.samples.length,
                    text=self.samples.source,
                    text_sha256=self.samples.sha256,
                ),
                "codes_sha256": self._renderer.store.digest(assignment_formats(plans[best])),
                "baselines": [
                    _baseline(name, plans[name], measured[name], result)
                    for name in plans
                    if name != best
                ],
            }
        )


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
    original = plan.original()
    check_model(original, device)
    check_text(text, "evaluation")
    reporter.say(f"Loading {original}")
    model = load_model(original, device)
    units = planned_units(model.module, plan)
    if packed:
        quantized = load_packed(target, device, torch.float32)
        run = with_cache(quantized, quantized.logits, plan.kv_cache)
    else:
        beside = target if target.is_dir() else target.parent
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


def _read_measurements(cache: Path, samples: Samples) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(cache.read_text(encoding="utf-8"))
        if known["text_sha256"] == samples.sha256:
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or damaged: measured again
    return {"text_sha256": samples.sha256, "ppl_original": None, "plans": {}}


def _measurement(entry: dict[str, Any]) -> Measurement:
    nll = None if entry["nll"] is None else np.array(entry["nll"])
    return Measurement(np.array(entry["kl"]), nll, entry["tokens"])


def _baseline(name: str, plan: Plan, measured: Measurement, shipped: Measurement) -> Baseline:
    difference, stderr = measured.minus(shipped)
    return Baseline(
        name=name,
        bytes=plan.total_bytes,
        predicted_kl=plan.predicted_kl,
        kl=measured.mean_kl,
        kl_stderr=measured.kl_stderr,
        ppl=measured.perplexity,
        ms=plan.latency.ms if plan.latency else None,
        difference=difference,
        difference_stderr=stderr,
    )

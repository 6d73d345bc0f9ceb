"""Profile a model: one sensitivity table from one streaming pass."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._base.progress import Reporter
from ..models.coverage import Left
from ..models.find import as_stored, coverage, find_units, unplanned_tensors
from ..models.identity import definition_sha256, state_sha256
from ..models.load import load_model
from ..models.measure import measure, plan_runner
from ..models.names import MIXTURE
from ..models.origin import Origin
from ..models.rendering import Renderer
from ..models.rest import extra_bytes, fp8_bytes, kept_as_fp8
from ..models.rounding_samples import SEQUENCES, in_halves, rounding_samples
from ..models.samples import Samples, calibration_samples, samples_from_batches
from ..models.sites import places
from ..models.units import UnitInfo
from ..models.workload import Batch, LoadedModel, Workload, parameter_dtype, tie
from ..quantizers.candidates import DEFAULT_FORMATS, expanded
from ..quantizers.format import Format, resolve_formats
from ..quantizers.methods import METHODS
from .evidence import calibrated
from .metrics import METRICS, Scores, Task
from .provenance import ModelRef, Provenance
from .shrinkage import Shrinkage
from .statistics import REVISION, Statistics
from .table import SensitivityTable, stored_bytes

_HEADER_ENTRY = 170  # for a tensor, besides its name: dtype, shape, offsets, part, checksum
_HEADER_START = 1000
_SCALE_SAMPLES = 8  # samples on which the scale of a metric that is not in nats is measured


def profile(
    model: str | nn.Module | LoadedModel,
    batches: Samples | Sequence[Batch] | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    metric: str = "fisher",
    rounding: str = "rtn",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    groups: Sequence[str] = (),
    per_expert: bool = False,
    rounding_sequences: int = SEQUENCES,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> SensitivityTable:
    """Price every unit of a model in every format.

    Args:
        model: A model name (see :func:`load_model`), any module, or a loaded model.
        batches: Calibration batches; None takes the default mixture of texts (language models)
            or the batches the model's own function yields. A rounding method that needs data sees
            the first half of them, and prices come from the second.
        formats: Candidate formats.
        metric: Name of the sensitivity metric; see ``bitplan metrics``.
        rounding: Name of the rounding method whose errors are priced.
        include: Globs on module names; empty means every quantizable module.
        exclude: Globs on module names to leave as they are.
        groups: Fusion rules such as ``q_proj,k_proj,v_proj``.
        per_expert: Make every expert a unit of its own, instead of a layer's experts together.
        rounding_sequences: Where batches are the built-in prose: further sequences of it that a
            rounding method sees, if it needs data.
        seed: Seed of calibration and probes.
        reporter: Where progress is shown; silent by default.

    Returns:
        The table: bytes, predicted KL increase (nats per token) and its standard error.

    Raises:
        ValueError: If a name is unknown, the model is not finite, or nothing matches.
    """
    loaded = as_loaded_model(model)
    METRICS.get(metric)
    candidates = resolve_formats(expanded(formats), loaded.source_dtype)
    units = find_units(loaded.module, include, exclude, groups, per_expert)
    show = reporter or Reporter(quiet=True)
    samples, seen = _as_samples(loaded, batches, seed), None
    if METHODS.trait(rounding, "needs"):
        if batches is None and loaded.is_language_model:
            seen = rounding_samples(
                loaded, MIXTURE, sequences=rounding_sequences, seed=seed, priced=samples.count
            )
        else:
            samples, seen = in_halves(samples, show)
    selected = bool(include or exclude)
    origin = provenance(loaded, units, candidates, samples, metric, rounding, seed, selected, seen)
    renderer = calibrated(
        loaded, units, rounding, seen, model_sha256=origin.model.sha256, reporter=show
    )
    return price(loaded, units, candidates, renderer, samples, origin, show)


def price(
    model: LoadedModel,
    units: tuple[UnitInfo, ...],
    formats: tuple[Format, ...],
    renderer: Renderer,
    samples: Samples,
    origin: Provenance,
    reporter: Reporter,
) -> SensitivityTable:
    """Make the table that ``origin`` (see :func:`provenance`) describes.

    The renderings that are priced stay in ``renderer``, for whoever measures or writes them.

    Raises:
        ValueError: If the model gives NaN or Inf, or a unit has no part in its output.
    """
    renderer.fit(formats, reporter)
    if isinstance(renderer.store.evidence, Statistics):
        chosen = {"mixtures": renderer.store.evidence.chosen}
        origin = origin.model_copy(update={"evidence": (origin.evidence or {}) | chosen})
    with reporter.bar(f"Profiling ({origin.metric})", samples.count) as advance:
        seed = origin.seed or 0
        task = Task(model, units, formats, renderer, samples, seed, advance)
        scores = METRICS.get(origin.metric)(task)
    if task.unreached:
        origin = _with_unreached(origin, task.unreached)
    values = scores.values if scores.signed else np.sqrt(np.maximum(scores.values, 0))
    if scores.diagonal is None:
        kl, stderr = _prices(scores)
    else:
        shrinkage = Shrinkage(scores.values, scores.diagonal, [unit.kind for unit in units])
        kl, stderr = shrinkage.prices(), shrinkage.stderr()
    held = _held(renderer, units, formats)
    kl[~held] = np.nan
    stderr[~held] = 0.0
    scale = 1.0 if scores.in_nats else _fitted_scale(task, kl, reporter)
    return SensitivityTable(
        units=units,
        formats=tuple(fmt.name for fmt in formats),
        bytes=stored_bytes(units, formats),
        kl=kl * scale,
        stderr=stderr * scale,
        scores=values * np.float32(scale**0.5) if len(values) > 1 else None,
        diagonal=scores.diagonal,
        signed=scores.signed,
        provenance=origin,
    )


def _held(
    renderer: Renderer, units: Sequence[UnitInfo], formats: Sequence[Format]
) -> NDArray[np.bool_]:
    """Which formats can hold which units: bool [U, F].

    Raises:
        ValueError: If none can hold a unit; names it.
    """
    held = np.ones((len(units), len(formats)), dtype=bool)
    refused: dict[str, None] = {}
    for u, unit in enumerate(units):
        for f, fmt in enumerate(formats):
            reasons = [r for name in unit.modules if (r := renderer.refusal(name, fmt))]
            held[u, f] = not reasons
            refused |= dict.fromkeys(reasons)
        if not held[u].any():
            reason = next(reversed(refused)).partition(": ")[2]
            raise ValueError(f"No format given can hold {unit.name!r}. {reason}")
    if refused:
        names = sorted({reason.partition(":")[0] for reason in refused})
        warnings.warn(
            f"Weights too large for some formats, which are no candidates there: {names[0]}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            stacklevel=3,
        )
    return held


def _with_unreached(origin: Provenance, names: Sequence[str]) -> Provenance:
    """Say which experts have the price of their kind, here and in the profile."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    warnings.warn(
        f"No calibration token reached {len(names)} experts ({shown}). They get the price of their "
        "kind; calibrate on more text, or on text that is like what the model will read.",
        stacklevel=3,
    )
    known = (origin.coverage or {}) | {"unreached": list(names)}
    return origin.model_copy(update={"coverage": known})


def as_loaded_model(model: str | nn.Module | LoadedModel) -> LoadedModel:
    """Accept a name, a module or a loaded model; a bare module is frozen and kept in place."""
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str):
        return load_model(model)
    source = parameter_dtype(model)
    if source != "float32":
        raise ValueError(
            f"The model is in {source}; prices are computed in float32. Pass model.float(), which "
            "changes no weight."
        )
    tie(model)
    model.requires_grad_(False).eval()
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return LoadedModel(name, model, source, Workload(model))


def provenance(
    model: LoadedModel,
    units: Sequence[UnitInfo],
    formats: Sequence[Format],
    samples: Samples,
    metric: str,
    rounding: str,
    seed: int,
    selected: bool = False,
    seen: Samples | None = None,
    idle: Collection[str] = (),
) -> Provenance:
    """What produced a table; equal provenance of two runs means equal tables.

    ``seen`` are the sequences that weights are rounded by, if the method needs any, and ``idle``
    the weights that are in no unit since the output does not depend on them.
    """
    apart = {"rounding_sequences": seen.count, "rounding_sha256": seen.sha256} if seen else {}
    return Provenance(
        model=ModelRef(id=model.id, revision=model.revision, sha256=state_sha256(model.module)),
        definition_sha256=definition_sha256(model),
        dtype=model.source_dtype,
        metric=metric,
        rounding=rounding,
        calibration=samples.describe() | apart | _counted(model, samples),
        seed=seed,
        outside_bytes=_outside_bytes(model, units, formats),
        file_bytes=model.file_bytes,
        coverage=replace(
            coverage(model.module, units, selected, idle), carried=_carried(model.origin)
        ).to_json(),
        layer_types=_layer_types(model.module, units),
        evidence=_evidence(rounding, seen),
        versions={name: version(name) for name in ("bitplan", "torch", "transformers", "numpy")},
    )


def _carried(origin: Origin | None) -> tuple[Left, ...]:
    """What the checkpoint has and the model does not."""
    return () if origin is None else tuple(one.left() for one in origin.carried)


def _evidence(rounding: str, seen: Samples | None) -> dict[str, Any] | None:
    """What a rounding method looked at, the data that was made from, and which codes come of it."""
    if seen is None:
        return None
    needs = METHODS.trait(rounding, "needs")
    revisions = [METHODS.trait(rounding, "revision", 1)]
    revisions += [REVISION] if "fisher" in needs else []
    made_by = ".".join(map(str, revisions))
    return {"needs": sorted(needs), "data_sha256": seen.sha256, "revision": made_by}


def _counted(model: LoadedModel, samples: Samples) -> dict[str, str]:
    """What a KL is a mean over, unless it is tokens; one batch is run to see it."""
    if model.is_language_model or samples.length is not None:
        return {}
    with torch.no_grad():
        positions = model.logits(samples.batches[0]).shape[1]
    return {"per": "sample" if positions == 1 else "position"}


def _layer_types(model: nn.Module, units: Sequence[UnitInfo]) -> dict[str, str]:
    """What units are that are more, or less, than a product of a matrix with every input vector."""
    types = {place.name: place.layer_type for place in places(model)}
    found = {}
    for unit in units:
        kinds = [types[name] for name in (*(part.module for part in unit.parts), *unit.aliases)]
        lookups = [kind == "embedding" for kind in kinds]
        other = next((kind for kind in kinds if kind not in ("linear", "embedding")), None)
        if any(lookups):
            found[unit.name] = "embedding" if all(lookups) else "tied embedding"
        elif other is not None:
            found[unit.name] = other
    return found


def _outside_bytes(model: LoadedModel, units: Sequence[UnitInfo], formats: Sequence[Format]) -> int:
    """Bytes of a written model file that are not units, header included (an upper bound)."""
    others, tied = unplanned_tensors(model.module, units)
    dtype = getattr(torch, model.source_dtype)
    fp8 = set(kept_as_fp8(model.origin, others))
    tensors = sum(as_stored(t, dtype).nbytes for name, t in others.items() if name not in fp8)
    if model.origin is not None:
        tensors += sum(fp8_bytes(model.origin, name) for name in fp8)
        tensors += extra_bytes(model.origin, others)
    # Every tensor has an entry in the header and a checksum in bitplan's part of it, and every
    # matrix, alias and tied name an entry there, too; a matrix in parts lists its rows.
    stored = max(len(fmt.tensors((1, 1))) for fmt in formats)
    header = sum(2 * len(name) + _HEADER_ENTRY for name in others)
    header += sum(len(name) + len(owner) + _HEADER_ENTRY for name, owner in tied.items())
    for unit in units:
        longest = max(map(len, unit.modules))
        header += sum(len(alias) + longest + _HEADER_ENTRY for alias in unit.aliases)
        for part in unit.parts:
            header += stored * (2 * len(part.name) + _HEADER_ENTRY)
            header += len(part.name) + _HEADER_ENTRY + 40 * len(part.rows or ())
    return tensors + header + _HEADER_START


def _as_samples(
    model: LoadedModel, batches: Samples | Sequence[Batch] | None, seed: int
) -> Samples:
    if isinstance(batches, Samples):
        return batches
    if batches is None:
        return calibration_samples(model, MIXTURE, seed=seed)
    return samples_from_batches(batches, model, "batches", seed)


def _prices(scores: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean price and standard error [U, F] of the per-sample scores."""
    values = scores.values.astype(np.float64)
    if scores.signed:
        values = values**2
    count = len(values)
    stderr = np.zeros(values.shape[1:])
    if count > 1:
        stderr = values.std(axis=0, ddof=1) / count**0.5
    return np.maximum(values.mean(axis=0), 0.0), stderr


def _fitted_scale(task: Task, kl: NDArray[np.float64], reporter: Reporter) -> float:
    """Nats per unit of score, from uniform plans measured on a few calibration samples.

    The geometric mean of measured KL over summed score, for the formats in the middle of the
    range: the largest errors saturate and the smallest drown in rounding.
    """
    totals = kl.sum(axis=0)
    order = [i for i in np.argsort(totals) if totals[i] > 0]  # not NaN: all units can have it
    chosen = order[len(order) // 4 : -(len(order) // 4) or None][:4] or order[:1]
    if not chosen:
        raise ValueError("Every format reproduces every weight exactly: there is nothing to price.")
    samples = task.samples.head(_SCALE_SAMPLES)
    runs = {
        str(i): plan_runner(
            task.model, task.renderer, dict.fromkeys(task.renderer.names, task.formats[i])
        )
        for i in chosen
    }
    passes = len(samples.batches) * (1 + len(runs))
    with reporter.bar("Fitting the metric's scale to measured KL", passes) as advance:
        measured, _ = measure(task.model, runs, samples, lambda: advance(1))
    ratios = [measured[str(i)].mean_kl / totals[i] for i in chosen]
    return float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-30)))))

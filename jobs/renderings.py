"""Renderers of runs and plans: where their codes are kept, and how they are made again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .._base.progress import Reporter
from ..models.load import load_tokenizer
from ..models.mixture import Share, recorded_shares
from ..models.names import BUILTIN, SAMPLED, SELF, SHIPPED
from ..models.rendering import Renderer
from ..models.rounding_samples import in_halves
from ..models.samples import Samples, calibration_samples, samples_from_batches
from ..models.units import UnitInfo
from ..models.workload import Batch, LoadedModel
from ..quantizers.format import Format
from ..quantizers.methods import METHODS
from ..search.plan import Plan
from ..sensitivity.evidence import Seen, calibrated
from .folder import RunFolder
from .record import JobRecord
from .tuned import tuned_renderer


def plan_renderer(
    plan: Plan,
    model: LoadedModel,
    units: Sequence[UnitInfo],
    *,
    beside: RunFolder | None = None,
    batches: Samples | Sequence[Batch] | None = None,
    reporter: Reporter | None = None,
) -> Renderer:
    """A renderer with the weights that a plan was measured with.

    Codes that cannot be recomputed are taken from the folder of the run, or else made again from
    the rounding sequences that the plan names.  Weights that were rounded again for the plan, and
    tuned scales, are only in that folder.

    Args:
        plan: The plan.
        model: The plan's model.
        units: The planned units.
        beside: The folder the plan lies in, which may be that of the run.
        batches: The calibration data; by default those that the plan names.
        reporter: Where progress is shown.

    Raises:
        ValueError: If the calibration data are needed and not found, or the codes made from them
            are not those that were priced, or what was made for the plan alone is not there.
    """
    kept = beside.renderings if beside and beside.renderings.is_dir() else None
    writes = kept is not None and os.access(kept, os.W_OK)
    if batches is None and METHODS.trait(plan.rounding, "needs"):
        model = _reading(model, plan)
    renderer = calibrated(
        model,
        units,
        plan.rounding,
        Seen(
            lambda: recorded_samples(plan, model, beside, batches),
            _seen_sha256(plan),
            int(plan.calibration.get("seed") or 0),
        ),
        model_sha256=plan.model.sha256,
        folder=kept,
        statistics=beside.statistics if beside and writes else None,
        reporter=reporter,
    )
    formats = {name: Format.parse(spec) for name, spec in plan.assignments.items()}
    renderer = tuned_renderer(renderer, plan, beside, reporter)
    renderer.store.complete(formats.items(), reporter)
    if plan.codes_sha256 and (found := renderer.store.digest(formats)) != plan.codes_sha256:
        raise ValueError(
            f"Rounding by {plan.rounding!r} on this machine does not give the codes that were "
            f"priced and measured (sha256 {plan.codes_sha256[:12]}…, here {str(found)[:12]}…): "
            "processors and versions of torch add up differently. Use the plan in the folder of "
            "its run, with the renderings folder, or search again here."
        )
    return renderer


def recorded_samples(
    plan: Plan,
    model: LoadedModel,
    beside: RunFolder | None = None,
    batches: Samples | Sequence[Batch] | None = None,
) -> Samples:
    """The sequences that a plan's weights were rounded by.

    Args:
        plan: The plan.
        model: Its model.
        beside: The folder the plan lies in; the run's record there knows the path of a text.
        batches: The data, if they are at hand; compared with the plan's by hash.

    Raises:
        ValueError: If they are not found, or are others.
    """
    wanted = plan.calibration
    name, seed = str(wanted.get("source")), int(wanted.get("seed") or 0)
    if isinstance(batches, Samples):
        found = [batches]
    elif batches is not None:
        found = [samples_from_batches(batches, model, name, seed)]
    else:
        found = list(_candidates(plan, model, beside))
    for samples in found:
        for some in (samples, in_halves(samples)[1]):
            if some.sha256 == _seen_sha256(plan):
                return some
    count = wanted.get("rounding_sequences", wanted.get("sequences"))
    what = f"{count} sequences of {name!r}"
    why = "those given are others" if found else "they were not found"
    if found and batches is None:
        why = f"what is called {name!r} here is another text, or is cut into other tokens"
    elif batches is None and wanted.get("length") and not model.is_language_model:
        why = f"no tokenizer is found under the name of the model, {plan.model.id!r}"
    raise ValueError(
        f"The weights were rounded by {plan.rounding!r} on {what}, which are needed to round them "
        f"again, and {why}. Use the plan in the folder of its run, with the renderings "
        "folder, or put the text in the current folder; from Python, give the batches."
    )


def _reading(model: LoadedModel, plan: Plan) -> LoadedModel:
    """A model that was given without data or tokenizer, with the tokenizer of the plan's model."""
    if model.workload.calibration or model.is_language_model:
        return model
    tokenizer = load_tokenizer(plan.original())
    return replace(model, workload=replace(model.workload, tokenizer=tokenizer))


def _candidates(plan: Plan, model: LoadedModel, beside: RunFolder | None) -> Iterator[Samples]:
    wanted = plan.calibration
    count, length, seed = (int(wanted.get(n) or 0) for n in ("sequences", "length", "seed"))
    further = int(wanted.get("rounding_sequences") or 0) if model.is_language_model else 0
    for source in _sources(plan, beside) if model.is_language_model else (BUILTIN,):
        try:
            yield calibration_samples(
                model, source, further or count or 1, length, seed, skip=count if further else 0
            )
        except ValueError:  # not there, or too short
            continue


def _seen_sha256(plan: Plan) -> str:
    """Hash of the rounding sequences; a plan that does not name any was rounded by its prices'."""
    found = plan.calibration.get("rounding_sha256", plan.calibration.get("sha256"))
    return str(found or "")


def _sources(plan: Plan, beside: RunFolder | None) -> Iterator[str | tuple[Share, ...]]:
    """Where the calibration texts may be; a plan holds names of files without the folder."""
    shares = recorded_shares(plan.calibration)
    if all(share.source in (*SHIPPED, *SAMPLED) for share in shares):
        yield shares
        if len(shares) > 1 or shares[0].source in (BUILTIN, SELF):
            return  # else it may be the name of a file, from when that was no other name
    if beside is not None and beside.job.is_file():
        settings = JobRecord.load(beside.path).settings
        yield str(settings.get("profile", {}).get("calibration"))
    words = shlex.split(plan.command or "")
    for i, word in enumerate(words):
        option, _, value = word.partition("=")
        if option == "--calibration":
            yield value or "".join(words[i + 1 : i + 2])
    yield shares
    if beside is not None:
        near = (beside.path / share.source for share in shares)
        yield tuple(
            replace(share, source=str(path)) if path.is_file() else share
            for share, path in zip(shares, near, strict=True)
        )

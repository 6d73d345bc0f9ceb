"""What an exporter writes: a plan with the packed weights it was priced with, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .._base.progress import Reporter
from ..jobs.folder import RunFolder, plan_path
from ..jobs.folding import FoldedScales, folded, folded_scales
from ..jobs.materialize import assignment_formats, is_packed, load_packed, planned_units
from ..jobs.renderings import plan_renderer
from ..models.find import as_stored, find_matrices, unplanned_tensors
from ..models.load import check_model, load_model, load_structure
from ..models.measure import Run, plan_runner
from ..models.rendering import Renderer
from ..models.rest import carried, carried_of, from_stored_form
from ..models.units import UnitInfo, matrix_name
from ..models.workload import LoadedModel
from ..quantizers.checkpoint import read_checkpoint
from ..quantizers.format import Format
from ..quantizers.packed import PackedTensor
from ..search.plan import Plan


@dataclass(frozen=True, slots=True)
class Source:
    """A plan and its weights.

    Attributes:
        plan: The plan.
        model: The original model, or the packed one of a folder: config, tokenizer, structure.
        units: The planned matrices, one unit each, with the aliases that share their weights.
        everything: Those and the matrices that the plan leaves as they are.
        others: Makes pairs of name and tensor of everything the plan leaves as it was, in the
            checkpoint's own dtype, and of what it has and the model does not; shared ones once.
        tied: Other names of those tensors -> the name in ``others``.
        packed: Makes the packed weight of a matrix: the codes and scales the plan was priced with.
            Made anew at every call, so a caller that lets go of each holds one at a time.
        logits: Runs the dequantized model on a batch: the reference of every comparison.
        like: A file of the same model in the target's own form that lends what the source lacks.
        folds: Reads the scales that were folded into the model; None if none were.
        reporter: Where progress is shown.
    """

    plan: Plan
    model: LoadedModel
    units: tuple[UnitInfo, ...]
    everything: tuple[UnitInfo, ...]
    others: Callable[[], Iterator[tuple[str, Tensor]]]
    tied: Mapping[str, str]
    packed: Callable[[str], PackedTensor]
    logits: Run
    like: Path | None = None
    folds: Callable[[], FoldedScales] | None = None
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))

    @property
    def formats(self) -> dict[str, Format]:
        """Canonical module name -> format."""
        return assignment_formats(self.plan)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Canonical module name -> (rows, cols), rows = output features."""
        return {unit.name: unit.shapes[0] for unit in self.units}

    @property
    def aliases(self) -> dict[str, str]:
        """Alias -> canonical module name."""
        return {alias: unit.parts[0].module for unit in self.units for alias in unit.aliases}

    def each(self, what: str = "Writing") -> Iterator[tuple[str, PackedTensor]]:
        """Name and packed weight of every matrix in turn, with a progress bar."""
        sizes = [unit.weights for unit in self.units]
        with self.reporter.bar(what, len(self.units), sizes) as advance:
            for unit in self.units:
                yield unit.name, self.packed(unit.name)
                advance(1)


def open_source(
    target: Path | Plan,
    *,
    model: LoadedModel | None = None,
    change: Callable[[Plan, LoadedModel], Plan] | None = None,
    like: Path | None = None,
    weights: bool = True,
    reporter: Reporter | None = None,
) -> Source:
    """Open a plan, a run or a packed folder.

    Args:
        target: A plan, its file, a run folder, or a folder that ``bitplan quantize`` wrote.
        model: The original model, when it is loaded already.
        change: What to do to the plan first; not possible with a packed folder.
        like: See :class:`Source`.
        weights: Whether they are needed; without, only the model's layers are read, and nothing of
            the source that takes weights can be used.
        reporter: Where progress is shown.

    Raises:
        ValueError: If there is no plan, or plan and model do not match.
    """
    reporter = reporter or Reporter(quiet=True)
    plan, layers, beside = target, None, None
    if isinstance(target, Path):
        beside = RunFolder.around(target)
        if is_packed(target) and weights:
            source = _with_folds(_from_folder(target, like, reporter), beside)
            return _unchanged(source, target, change)
        if is_packed(target) and (target / "config.json").is_file():
            layers = str(target)  # the original may be gone
        plan = Plan.load(plan_path(target))
    assert isinstance(plan, Plan)
    if model is None:
        name = layers or plan.original()
        check_model(name, "cpu", weights)
        reporter.say(f"Loading {name}" if weights else f"Reading the layers of {name}")
        model = load_model(name, "cpu") if weights else load_structure(name)
    folded(model.module, plan, beside)
    before, plan = plan, change(plan, model) if change else plan
    if plan.assignments != before.assignments:
        plan = plan.model_copy(update={"codes_sha256": None})  # that of other formats
    units = planned_units(model.module, plan)
    if weights:
        renderer = plan_renderer(plan, model, units, beside=beside, reporter=reporter)
    else:
        renderer = Renderer(model.module, units, plan.rounding)
    return _with_folds(_from_plan(plan, model, units, renderer, like, reporter), beside)


def _with_folds(source: Source, beside: RunFolder | None) -> Source:
    if source.plan.fold is None:
        return source
    return replace(source, folds=partial(folded_scales, source.plan, beside))


def _unchanged(
    source: Source, folder: Path, change: Callable[[Plan, LoadedModel], Plan] | None
) -> Source:
    if change and change(source.plan, source.model) != source.plan:
        raise ValueError(
            f"{folder} is packed, so its formats cannot be changed. Give its plan "
            f"({RunFolder(folder).plan}) instead."
        )
    return source


def _from_plan(
    plan: Plan,
    model: LoadedModel,
    units: tuple[UnitInfo, ...],
    renderer: Renderer,
    like: Path | None,
    reporter: Reporter,
) -> Source:
    formats = assignment_formats(plan)
    unplanned, tied = unplanned_tensors(model.module, units)
    dtype = getattr(torch, model.source_dtype)

    def others() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in unplanned.items():
            yield name, as_stored(tensor, dtype).contiguous()
        if model.origin is not None:
            yield from carried_of(model.origin)

    def packed(name: str) -> PackedTensor:
        return renderer.store.packed(name, formats[name])

    run = plan_runner(model, renderer, formats)
    everything = find_matrices(model.module, plan.row_ranges)
    return Source(
        plan, model, units, everything, others, tied, packed, run, like, reporter=reporter
    )


def _from_folder(folder: Path, like: Path | None, reporter: Reporter) -> Source:
    plan = Plan.load(RunFolder(folder).plan)
    reporter.say(f"Loading {folder}")
    model = load_packed(folder)
    packed, stored, header = read_checkpoint(folder)
    others = from_stored_form(header, stored) | dict(carried(header, stored))
    names: dict[str, list[str]] = {matrix_name(name): [] for name in packed}
    for alias, owner in header["aliases"].items():
        names[owner].append(alias)
    rows = plan.row_ranges
    units = tuple(
        UnitInfo(
            name,
            (name,),
            (packed[name].shape,),
            name,
            None,
            tuple(names[matrix_name(name)]),
            (rows[name],) if name in rows else (),
        )
        for name in packed
    )
    return Source(
        plan,
        model,
        units,
        (*units, *_unpacked(model)),
        lambda: iter(others.items()),
        header["tied"],
        packed.__getitem__,
        model.logits,
        like,
        reporter=reporter,
    )


def _unpacked(model: LoadedModel) -> tuple[UnitInfo, ...]:
    return find_matrices(model.module)

"""Folded models: scales as a run folder keeps them, and models that have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._base.files import atomic_path
from .._base.progress import Reporter
from .._base.tensors import bytes_of
from ..models.fold_tracing import find_folds, within
from ..models.folds import Fold, apply_fold, effective_scale
from ..models.identity import definition_sha256, state_sha256
from ..models.samples import Samples
from ..models.streamed import is_streamed
from ..models.units import UnitInfo
from ..models.workload import LoadedModel
from ..quantizers.format import Format
from ..search.plan import Plan
from ..sensitivity.folding import REVISION, fold_scales
from ..sensitivity.provenance import FoldRef
from .folder import RunFolder

_MOST_CHANGE = 1e-3  # of the logits, relative to the largest: float32 rounding is far below


@dataclass(frozen=True, slots=True)
class FoldedScales:
    """Folds with their scales, as a file holds them.

    Attributes:
        folds: The folds, in the order in which they are made.
        scales: The scales of each [channels], by the name of its source.
        dtype: The checkpoint's own, in which norms are stored.
    """

    folds: tuple[Fold, ...]
    scales: Mapping[str, Tensor]
    dtype: str

    @property
    def sha256(self) -> str:
        """Hash of everything: the file is called by it."""
        digest = hashlib.sha256(f"{self.dtype}\n".encode())
        for fold in self.folds:
            digest.update(json.dumps(asdict(fold), sort_keys=True).encode())
            digest.update(bytes_of(self.scales[fold.source]))
        return digest.hexdigest()

    def save(self, path: Path, key: str = "") -> None:
        """Write a file, with what the scales were chosen from as a hash."""
        tensors = {f"{source}.scale": scale for source, scale in self.scales.items()}
        described = []
        for fold in self.folds:
            entry = asdict(fold)
            if columns := entry.pop("columns"):
                tensors[f"{fold.source}.columns"] = torch.tensor(columns, dtype=torch.int32)
            described.append(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"folds": json.dumps(described), "dtype": self.dtype, "key": key}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, header)

    @classmethod
    def load(cls, path: Path) -> tuple[FoldedScales, str]:
        """What a file holds, and the key it was kept under."""
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = set(file.keys())
            folds, scales = [], {}
            for entry in json.loads(header["folds"]):
                source = entry["source"]
                columns = f"{source}.columns"
                found = file.get_tensor(columns).tolist() if columns in names else ()
                matrices = tuple(entry.pop("matrices"))
                folds.append(Fold(**entry, matrices=matrices, columns=tuple(found)))
                scales[source] = file.get_tensor(f"{source}.scale")
        return cls(tuple(folds), scales, header["dtype"]), header["key"]

    def apply(self, model: nn.Module) -> None:
        """Make all folds, in place."""
        for fold in self.folds:
            apply_fold(model, fold, self.scales[fold.source], getattr(torch, self.dtype))

    def unfolded(self, name: str, matrix: Tensor) -> Tensor:
        """A matrix of the folded model [rows, cols] as it was before, to float32 rounding."""
        matrix = matrix / self.column_scale(name, matrix.shape[1])
        return matrix * self.scales[name][:, None] if name in self.linear else matrix

    @property
    def linear(self) -> set[str]:
        """Names of the linear layers whose rows were divided."""
        return {fold.source for fold in self.folds if fold.offset is None}

    def column_scale(self, name: str, cols: int) -> Tensor:
        """What the columns of a matrix were multiplied by [cols]."""
        found = torch.ones(cols)
        for fold in self.folds:
            if name in fold.matrices:
                found = found * fold.over_columns(self.scales[fold.source])
        return found


def fold_model(
    model: LoadedModel,
    units: Sequence[UnitInfo],
    method: str,
    formats: Sequence[Format],
    rounding: str,
    samples: Samples,
    folder: RunFolder | None,
    reporter: Reporter,
) -> FoldRef | None:
    """Choose scales and fold them into a model, in place; an earlier run's are found.

    Folds that would change a matrix that no unit has are left out, which is said.

    Args:
        model: The original model.
        units: Its units.
        method: How scales are chosen; see :func:`.sensitivity.folding.fold_scales`.
        formats: The candidate formats.
        rounding: Name of the rounding method.
        samples: What scales are chosen on; the first sequence is what the model is traced on.
        folder: Where the scales are kept.
        reporter: Where progress is shown.

    Returns:
        What the plan says of it; None if the model has nothing to fold.

    Raises:
        ValueError: If the folded model gives other logits, or its weights stay in files.
    """
    _check_in_memory(model.module)
    before = state_sha256(model.module)
    parts: list[object] = [before, definition_sha256(model), model.source_dtype, method, rounding]
    parts += [
        REVISION,
        samples.sha256,
        [unit.name for unit in units],
        [fmt.name for fmt in formats],
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    kept = _found(folder, key)
    batch = samples.batches[0]
    if kept is None:
        every = find_folds(model, batch, reporter)
        planned = {part.module for unit in units for part in unit.parts}
        folds, left = within(every, planned)
        if left:
            reporter.say(
                f"{len(left)} of {len(every)} folds left out, as they would scale matrices that "
                f"are in no unit: {left[0].source}" + (", ..." if len(left) > 1 else "")
            )
        if not folds:
            reporter.say("Nothing to fold: no norm or linear layer here feeds units alone")
            return None
        scales = fold_scales(model, folds, method, samples, formats, rounding, reporter)
        dtype = getattr(torch, model.source_dtype)
        scales = {
            fold.source: effective_scale(model.module, fold, scales[fold.source], dtype)
            for fold in folds
        }
        kept = FoldedScales(tuple(folds), scales, model.source_dtype)
        if folder is not None:
            kept.save(folder.fold(kept.sha256), key)
    with torch.no_grad():
        original = model.logits(batch)
        kept.apply(model.module)
        change = float((model.logits(batch) - original).abs().max() / original.abs().max())
    if not change <= _MOST_CHANGE:
        raise ValueError(
            f"Folding scales changed the logits of {model.id!r} by {change:.1g} of the largest, "
            "which rounding in float32 does not explain. Leave out --fold for this model."
        )
    reporter.say(
        f"Scales ({method}) folded into {len(kept.folds)} norms and linear layers; the logits "
        f"change by {change:.0e} of the largest"
    )
    return FoldRef(method=method, count=len(kept.folds), sha256=kept.sha256, model_sha256=before)


def folded(model: nn.Module, plan: Plan, beside: RunFolder | None) -> None:
    """Give the plan's original model the scales that were folded into it, in place, if any were.

    A model that has them is left as it is, and so is another model than the plan's: that is found
    out where units are compared.

    Args:
        model: The original model.
        plan: The plan.
        beside: The folder the plan lies in.

    Raises:
        ValueError: If the scales are not there, or are damaged, or weights stay in files.
    """
    if plan.fold is None or next(model.parameters()).is_meta:
        return
    if state_sha256(model) != plan.fold.model_sha256:
        return
    _check_in_memory(model)
    folded_scales(plan, beside).apply(model)


def _check_in_memory(model: nn.Module) -> None:
    if is_streamed(model):
        raise ValueError(
            "Folded scales change weights, and this model's stay in its files. Give it more "
            "--memory, or search without --fold."
        )


def folded_scales(plan: Plan, beside: RunFolder | None) -> FoldedScales:
    """The scales that were folded into a plan's model.

    Raises:
        ValueError: If they are not there, or are damaged.
    """
    assert plan.fold is not None
    if beside is None:
        raise ValueError(
            "Scales were folded into the model before the plan was made, and a plan alone does not "
            "hold them: give the path of its plan.json in the folder of its run."
        )
    path = beside.fold(plan.fold.sha256)
    if not path.is_file():
        raise ValueError(
            f"Scales were folded into the model before the plan was made, and {path}, which holds "
            f"them, is not there. Use the plan in the folder of its run, copy "
            f"{path.parent.name}/{path.name} from there, or search again with --fold "
            f"{plan.fold.method}."
        )
    kept = _loaded(path)
    if kept is None or kept[0].sha256 != plan.fold.sha256:
        raise ValueError(
            f"{path} does not hold the scales that were folded into the model: it is damaged, or "
            f"was changed. Copy it again from the plan's run, or search again with --fold "
            f"{plan.fold.method}."
        )
    return kept[0]


def _found(folder: RunFolder | None, key: str) -> FoldedScales | None:
    """What an earlier run has kept under a key."""
    files: Iterable[Path] = folder.folds.glob("*.safetensors") if folder is not None else ()
    for path in sorted(files):
        found = _loaded(path)
        if found is not None and found[1] == key:
            return found[0]
    return None


def _loaded(path: Path) -> tuple[FoldedScales, str] | None:
    """What a file holds; None if it is damaged."""
    try:
        return FoldedScales.load(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None

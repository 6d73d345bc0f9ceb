"""Tuned scales as a run folder keeps them, and renderers that have them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._base.files import atomic_path
from .._base.progress import Reporter
from .._base.tensors import bytes_of
from ..models.rendering import Assignment, Renderer
from ..quantizers.format import Format
from ..quantizers.scales import rescaled
from ..search.plan import Plan
from .folder import RunFolder
from .rerounded import rerounded_renderer


def save_scales(scales: Mapping[str, Tensor], assignment: Assignment, run: RunFolder) -> str:
    """Keep the scales of a tuned plan.

    Args:
        scales: By ``matrix.field``, float16.
        assignment: The plan.
        run: The run folder.

    Returns:
        Their SHA-256, which :func:`tuned_renderer` finds them by.
    """
    formats = {key: assignment[_split(key)[0]].name for key in scales}
    digest = _sha256(scales, formats)
    with atomic_path(run.tuned_scales(digest)) as temporary:
        save_file({key: part.contiguous() for key, part in scales.items()}, temporary, formats)
    return digest


def tuned_renderer(
    renderer: Renderer,
    plan: Plan,
    beside: RunFolder | None,
    reporter: Reporter | None = None,
) -> Renderer:
    """A renderer of the plan as it was measured: rounded again, with tuned scales, if it is so.

    Matrices whose format is another than when they were tuned, as where formats were rounded up
    for a runtime, have the scales they have without tuning.

    Args:
        renderer: Renders the plan as it was rounded first.
        plan: The plan.
        beside: The folder the plan lies in: that of the run, or one that has its tuned scales, and
            its weights if they were rounded again.
        reporter: Where progress is shown.

    Raises:
        ValueError: If the scales or weights are not there, or are damaged.
    """
    renderer = rerounded_renderer(renderer, plan, beside)
    if plan.tuning is None:
        return renderer
    scales, formats = _load(plan.tuning.sha256, beside)
    other = renderer.overlay()
    fields: dict[str, dict[str, Tensor]] = {}
    for key, part in scales.items():
        name, field = _split(key)
        if plan.assignments.get(name) == formats[key]:
            fields.setdefault(name, {})[field] = part
    assignment = {name: Format.parse(plan.assignments[name]) for name in fields}
    renderer.store.complete(assignment.items(), reporter)
    for name, fmt in assignment.items():
        packed = renderer.store.packed(name, fmt)
        device = next(iter(packed.tensors.values())).device
        some = {field: part.to(device) for field, part in fields[name].items()}
        other.store.put(name, fmt, rescaled(packed, some))
    return other


def _load(sha256: str, beside: RunFolder | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scales and their formats by ``matrix.field``."""
    if beside is None:
        raise ValueError(
            "The plan's scales were tuned, and a plan alone does not hold them: give the path of "
            "its plan.json in the folder of its run."
        )
    path = beside.tuned_scales(sha256)
    if not path.is_file():
        raise ValueError(
            f"The plan's scales were tuned, and {path}, which holds them, is not there. Use the "
            f"plan in the folder of its run, or copy {path.parent.name}/{path.name} from there, in "
            f"a folder of that name beside {beside.plan.name}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            formats = dict(file.metadata() or {})
            scales = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(_damaged(path)) from error
    if scales.keys() != formats.keys() or _sha256(scales, formats) != sha256:
        raise ValueError(_damaged(path))
    return scales, formats


def _damaged(path: Path) -> str:
    return (
        f"{path} does not hold the scales that the plan was measured with: it is damaged, or was "
        "changed. Copy it again from the plan's run, or search again with --tune."
    )


def _sha256(scales: Mapping[str, Tensor], formats: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key, part in sorted(scales.items()):
        digest.update(f"{key} {formats[key]} {tuple(part.shape)} {part.dtype}\n".encode())
        digest.update(bytes_of(part))
    return digest.hexdigest()


def _split(key: str) -> tuple[str, str]:
    name, _, field = key.rpartition(".")
    return name, field

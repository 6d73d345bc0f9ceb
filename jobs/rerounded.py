"""Weights that were rounded again as a run folder keeps them, and renderers that have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

from .._base.files import write_json
from .._base.tensors import bytes_of
from ..models.rendering import Renderer
from ..quantizers.packed import PackedTensor
from ..quantizers.shelf import Shelf
from ..search.plan import Plan
from .folder import RunFolder


class Kept:
    """Packed weights in a run folder, one file for each, by their own hash.

    Args:
        run: The run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run, self._shelf = run, Shelf(run.rounded)

    def put(self, packed: PackedTensor) -> str:
        """Keep a packed weight; its SHA-256."""
        digest = _sha256(packed)
        self._shelf.put(digest[:32], packed)
        return digest

    def get(self, digest: str, device: torch.device) -> PackedTensor | None:
        """The packed weight with a SHA-256; None if it is not there or damaged."""
        packed = self._shelf.get(digest[:32], device)
        return packed if packed is not None and _sha256(packed) == digest else None

    def save_list(self, digests: Mapping[str, str]) -> str:
        """Keep which weights belong together.

        Args:
            digests: SHA-256 by name of the matrix.

        Returns:
            The SHA-256 of that list, which :func:`rerounded_renderer` finds them by.
        """
        digest = _sha256_of_list(digests)
        write_json(self._run.rounded_list(digest), dict(sorted(digests.items())))
        return digest


def rerounded_renderer(renderer: Renderer, plan: Plan, beside: RunFolder | None) -> Renderer:
    """A renderer with the weights of a plan that were rounded again, if any were.

    Matrices whose format is another than they were rounded to, as where formats were rounded up
    for a runtime, are as they were first rounded.

    Args:
        renderer: Renders the plan as it was rounded first.
        plan: The plan.
        beside: The folder the plan lies in: that of the run, or one that has these weights.

    Raises:
        ValueError: If they are not there, or are damaged.
    """
    if plan.sequential is None:
        return renderer
    if beside is None:
        raise ValueError(
            "The plan's weights were rounded again, block by block, and a plan alone does not hold "
            "them: give the path of its plan.json in the folder of its run."
        )
    path = beside.rounded_list(plan.sequential.sha256)
    copy_it = "Use the plan in the folder of its run, where the same search makes again what is "
    copy_it += f"missing, or copy the folder {path.parent.name}/ from there beside "
    copy_it += f"{beside.plan.name}."
    if not path.is_file():
        raise ValueError(
            "The plan's weights were rounded again, block by block, and "
            f"{path}, which lists them, is not there. {copy_it}"
        )
    try:
        digests: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        if _sha256_of_list(digests) != plan.sequential.sha256:
            raise ValueError
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{path} does not list the weights that the plan was measured with: it is damaged, or "
            f"was changed. {copy_it}"
        ) from error
    other, kept = renderer.overlay(), Kept(beside)
    for name, digest in digests.items():
        if name not in plan.assignments:
            continue
        packed = kept.get(digest, renderer.weight(name).device)
        if packed is None:
            raise ValueError(
                f"The plan's weights were rounded again, block by block, and that of {name!r} is "
                f"not in {path.parent}, or is damaged. {copy_it}"
            )
        if packed.fmt.name == plan.assignments[name]:
            other.store.put(name, packed.fmt, packed)
    return other


def _sha256(packed: PackedTensor) -> str:
    digest = hashlib.sha256(f"{packed.fmt.name} {tuple(packed.shape)}\n".encode())
    for name, part in sorted(packed.tensors.items()):
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}\n".encode())
        digest.update(bytes_of(part))
    return digest.hexdigest()


def _sha256_of_list(digests: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()

"""The names that modules and tensors have in a model's own checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...models.fp8 import scales_of
from ...models.origin import reverted
from ...models.units import matrix_name
from ...models.workload import LoadedModel
from ..source import Source
from ..targets import Exporter, Stored


class OwnNames:
    """Names in memory and in the checkpoint; the same for a model without a checkpoint.

    Args:
        model: The model.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._own: Mapping[str, tuple[str, ...]] = model.origin.names if model.origin else {}
        self._modules: dict[str, str] = {}
        for key, own in self._own.items():
            if len(own) == 1:
                self._modules[_module(own[0])] = _module(key)

    def module(self, name: str) -> str:
        """The checkpoint's name of a module whose weight is written.

        Raises:
            ValueError: If the checkpoint has it as a part of a tensor, or in several.
        """
        own = self._own.get(f"{name}.weight", (f"{name}.weight",))
        if len(own) != 1:
            stands = (
                f"as {len(own)} tensors ({own[0]}, …)" if own else "as a part of another tensor"
            )
            raise ValueError(
                f"{name!r} is {stands} in the checkpoint, so it cannot be written in a format of "
                f"its own. Leave it out of the plan (--exclude '{name}')."
            )
        return _module(own[0])

    def spellings(self, name: str) -> list[str]:
        """The checkpoint's name of a module, and the one in memory where that is another.

        Some readers compare with the one and some with the other.
        """
        own = self._own.get(f"{name}.weight", (f"{name}.weight",))
        return list(dict.fromkeys([*map(_module, own[:1]), name]))

    def canonical(self, own: str) -> str:
        """The name in memory of a module that the checkpoint calls ``own``."""
        return self._modules.get(own, own)

    def tensors(self, others: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Tensors of the model as the checkpoint has them: renamed, fused or divided as there."""
        together: dict[str, Tensor] = {}
        for key, tensor in others:
            own = self._own.get(key, (key,))
            if len(own) == 1:
                yield {own[0]: tensor}
            elif own:
                yield reverted(self._model.module, {key: tensor})
            else:
                together[key] = tensor
        if together:
            yield reverted(self._model.module, together)


def read_stored(exporter: Exporter, path: Path, model: LoadedModel | None) -> Iterator[Stored]:
    """What a written checkpoint holds, by the names that modules have in memory."""
    if model is None:
        yield from exporter.read(path, model)
        return
    names = OwnNames(model)
    for stored in exporter.read(path, model):
        name = names.canonical(stored.name)
        yield stored if name == stored.name else replace(stored, name=name)


def check_inventory(source: Source, written: Mapping[str, object]) -> None:
    """Find out whether everything of the source's checkpoint is in what was written.

    Args:
        source: Plan and weights.
        written: The names of the tensors that were written.

    Raises:
        ValueError: Names the first tensor that is missing.
    """
    origin = source.model.origin
    if origin is None:
        return
    names = OwnNames(source.model)
    planned = {matrix_name(name) for name in source.formats}
    packed = {f"{spelling}.weight" for name in planned for spelling in names.spellings(name)}
    shared = {own for key in source.tied for own in origin.names.get(key, (key,))}
    shared |= {
        f"{spelling}.weight" for alias in source.aliases for spelling in names.spellings(alias)
    }
    scales = scales_of(origin.files) | origin.blocks  # of what is written decoded
    elsewhere = packed | shared | scales
    for name in origin.files:
        if name not in written and name not in elsewhere:
            raise ValueError(
                f"{name!r} of {origin.folder} is not among the {len(written):,} tensors that were "
                "written. Nothing was kept; please report this."
            )


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")

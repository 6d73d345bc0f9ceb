"""Targets: the files and configurations of other tools, one file per target."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from ..._base.hints import did_you_mean
from ..._base.registry import Registry
from ...models.measure import Run
from ...models.workload import LoadedModel
from ...quantizers.format import Format
from ..source import Source


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantized matrix as a written file holds it, told by that file alone.

    Attributes:
        name: Canonical module name.
        shape: (rows, cols), rows = output features.
        fmt: What its codes and scales amount to, as a format of ours.
        nbytes: Bytes of everything stored for it: codes, scales, zero points and what else the
            layout needs.
        weight: Dequantizes it: float32 [rows, cols] in the model's own order of rows.
        exact: Whether ``fmt`` says it all; False if it is the nearest format to something else.
    """

    name: str
    shape: tuple[int, int]
    fmt: Format
    nbytes: int
    weight: Callable[[], Tensor]
    exact: bool = True


class Exporter:
    """One target. The first line of the docstring is what ``bitplan exporters`` prints.

    A target has a checkpoint (``write``, ``read``, ``logits``), a configuration (``config``), or
    both; ``form`` and ``config_suffix`` say which. Before anything is written, the plan is checked
    against the rules of the runtime; after writing, what ``read`` finds is compared with the plan,
    and only then does the result get its name.

    Attributes:
        runtimes: The rules it can be checked against (``rules/NAME.toml``), the default first.
            Empty for plain data that no runtime reads.
        layout: The target whose files these are, as a user writes it; None for its own.
        extra: What installs the foreign tool: ``bitplan[EXTRA]``; None if nothing is needed.
        module: The foreign tool's import name, looked for before ``logits`` is called.
        form: Whether the checkpoint is a ``folder`` or a ``file``; None if there is none.
        weights: Whether the checkpoint holds the plan's weights.
        copies: Whether what a plan leaves as it was is copied from a file that may be quantized.
        suffix: What the checkpoint's file name ends with.
        config_suffix: What the configuration's file name ends with; None if there is none.
        needs: Packages that writing takes, besides those of bitplan itself.
        noise: What the tool's own arithmetic adds, measured; printed beside a comparison.
        max_kl: Most KL divergence (nats per token) from our model that is that noise.
        max_weight_error: Most that a weight read back may differ from ours, relative to the largest
            of its matrix.
    """

    runtimes: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[str | None] = None
    extra: ClassVar[str | None] = None
    module: ClassVar[str | None] = None
    form: ClassVar[Literal["folder", "file"] | None] = None
    weights: ClassVar[bool] = True
    copies: ClassVar[bool] = False
    suffix: ClassVar[str] = ""
    config_suffix: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    noise: ClassVar[str] = ""
    max_kl: ClassVar[float] = 1e-4
    max_weight_error: ClassVar[float] = 0.0

    def config(self, source: Source) -> str:
        """The plan in the tool's own configuration language.

        Raises:
            ValueError: If the tool cannot express it.
        """
        raise NotImplementedError

    def usage(self, path: Path, source: Source) -> str:
        """A line that says how the tool reads what was written; empty if that is plain."""
        return ""

    def write(self, source: Source, out: Path) -> None:
        """Write the checkpoint: our codes and scales, a matrix at a time.

        Args:
            source: Plan and weights; the plan keeps the runtime's rules.
            out: The file to make, or an existing empty folder.

        Raises:
            ValueError: If the source lacks something the target needs.
        """
        raise NotImplementedError

    def recognizes(self, path: Path) -> bool:
        """Whether a file or folder is this target's, so that ``bitplan import`` can read it."""
        return False

    def read(self, path: Path, model: LoadedModel | None = None) -> Iterator[Stored]:
        """What a written checkpoint holds, quantized matrices only.

        Args:
            path: The file or folder, written by us or by the tool.
            model: The original model; only for targets whose files lack the names of modules.

        Raises:
            ValueError: If it is damaged, or has no format of ours.
        """
        raise NotImplementedError

    def installed(self) -> bool:
        """Whether the foreign tool that ``logits`` needs can be imported."""
        return self.module is None or importlib.util.find_spec(self.module) is not None

    def most_tokens(self) -> int | None:
        """How many tokens a comparison can take in bearable time; None for any number."""
        return None

    def logits(self, path: Path) -> Run:
        """Load a checkpoint with the foreign tool.

        Returns:
            A function from a batch to float32 logits [samples, positions, classes].

        Raises:
            ImportError: If the tool is not installed.
        """
        raise NotImplementedError


EXPORTERS: Registry[type[Exporter]] = Registry("exporter", __name__)


def shown_name(name: str) -> str:
    """A target's name as the user writes it: its file's name, with dashes."""
    return name.replace("_", "-")


def find(name: str) -> tuple[str, Exporter, str | None]:
    """A target by its name or by the runtime it is for.

    Args:
        name: ``gguf``, ``compressed-tensors``, or a runtime such as ``vllm`` or ``llama.cpp``.

    Returns:
        The target's name, the target, and the runtime if that is what was given.

    Raises:
        ValueError: If there is no such target.
    """
    key = name.replace("-", "_")
    if key in EXPORTERS.names():
        return shown_name(key), EXPORTERS.get(key)(), None
    for candidate in EXPORTERS.names():
        exporter = EXPORTERS.get(candidate)
        if name in exporter.runtimes and exporter.form is not None:
            return shown_name(candidate), exporter(), name
    known = [shown_name(candidate) for candidate in EXPORTERS.names()]
    runtimes = {r for candidate in EXPORTERS.names() for r in EXPORTERS.get(candidate).runtimes}
    hint = did_you_mean(shown_name(name), [*known, *sorted(runtimes)])
    raise ValueError(f"Unknown exporter {name!r}.{hint} Available: {', '.join(known)}.")

"""The KV cache in the same search: one more row per layer, with its own widths as columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .._base.files import write_json
from .._base.records import Record
from .budget import format_bytes
from .problem import Caches, Problem

KIND = "kv_cache"
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class KVTable:
    """What the key/value cache of every layer costs at every width.

    Attributes:
        layers: Names of the L layers that keep a cache (``model.layers.0``).
        bits: The B widths, 16 for a cache that is not quantized.
        bytes_per_token: int64 [L, B], bytes per token of one sequence, scales included.
        kl: float64 [L, B], predicted KL increase in nats per token; 0 at the original width.
        stderr: float64 [L, B], standard error of ``kl``.
        scores: float32 [N, L, B], per-sequence scores with ``kl = mean(scores**2)``, in sqrt(nats
            per token), on the sequences of the weights' table; None if there are none.
        indices: Indices of the layers in the model; by default 0 to L - 1.
        windows: The most tokens each layer holds; 0 for all. By default all hold all.
        constants: Bytes per sequence of states that do not grow. By default none.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    bytes_per_token: NDArray[np.int64]
    kl: NDArray[np.float64]
    stderr: NDArray[np.float64]
    scores: NDArray[np.float32] | None = None
    indices: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check shapes and values.

        Raises:
            ValueError: If a shape is not that of layers and bits, or a number cannot be.
        """
        shape = (len(self.layers), len(self.bits))
        scores = np.zeros((1, *shape)) if self.scores is None else self.scores
        arrays = {"bytes_per_token": self.bytes_per_token, "kl": self.kl, "stderr": self.stderr}
        if scores.ndim != 3:
            raise ValueError(f"scores has shape {scores.shape}, expected (N, {shape}).")
        for name, array in (arrays | {"scores": scores[0]}).items():
            if array.shape != shape or 0 in shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}, not empty.")
            if not np.isfinite(array).all() or (name != "scores" and (array < 0).any()):
                raise ValueError(f"{name} of a KV table must be finite and not negative.")
        if len(set(self.layers)) < len(self.layers) or len(set(self.bits)) < len(self.bits):
            raise ValueError("A layer or a width is twice in the KV table.")

    @property
    def formats(self) -> tuple[str, ...]:
        """The widths as names of formats: ``kv16``, ``kv8`` ..."""
        return tuple(f"kv{bits}" for bits in self.bits)

    def sizes(self, context: int, batch: int) -> NDArray[np.int64]:
        """Bytes int64 [L, B] of every layer's cache at every width.

        Args:
            context: Tokens per sequence.
            batch: Sequences held at the same time.
        """
        count = len(self.layers)
        windows = np.array(self.windows or (0,) * count, dtype=np.int64)
        held = np.where(windows > 0, np.minimum(windows, context), context)
        constants = np.array(self.constants or (0,) * count, dtype=np.int64)
        return batch * (self.bytes_per_token * held[:, None] + constants[:, None])

    @property
    def is_planned(self) -> bool:
        """Whether there is more than one width to choose from."""
        return len(self.bits) > 1

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically."""
        _File(
            layers=list(self.layers),
            bits=list(self.bits),
            bytes_per_token=self.bytes_per_token.tolist(),
            kl=self.kl.tolist(),
            stderr=self.stderr.tolist(),
            scores=None if self.scores is None else self.scores.tolist(),
            indices=list(self.indices),
            windows=list(self.windows),
            constants=list(self.constants),
        ).write(path)

    @classmethod
    def load(cls, path: Path) -> KVTable:
        """Read a table written by :meth:`save`.

        Raises:
            ValueError: If the file is missing, or not such a table.
        """
        file = _File.read(path)
        try:
            return cls(
                layers=tuple(file.layers),
                bits=tuple(file.bits),
                bytes_per_token=np.array(file.bytes_per_token, dtype=np.int64),
                kl=np.array(file.kl, dtype=np.float64),
                stderr=np.array(file.stderr, dtype=np.float64),
                scores=None if file.scores is None else np.array(file.scores, dtype=np.float32),
                indices=tuple(file.indices),
                windows=tuple(file.windows),
                constants=tuple(file.constants),
            )
        except ValueError as error:
            raise ValueError(f"{path} is not a valid KV table: {error} {_File.MEND}") from error


class _File(Record):
    """The schema of a KV table's file."""

    KIND: ClassVar[str] = "KV table"
    MEND: ClassVar[str] = "Measure it again."

    schema_version: Literal[1] = Field(default=1, alias="schema")
    layers: list[str]
    bits: list[int]
    bytes_per_token: list[list[int]]
    kl: list[list[float]]
    stderr: list[list[float]]
    scores: list[list[list[float]]] | None
    indices: list[int] = Field(default_factory=list)
    windows: list[int] = Field(default_factory=list)
    constants: list[int] = Field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it without what plain caches do not have."""
        content = self.model_dump(by_alias=True)
        for name in ("windows", "constants"):
            if not content[name]:
                del content[name]
        write_json(path, content)


def with_kv(problem: Problem, kv: KVTable, context: int, batch: int) -> Problem:
    """Add one row per layer's cache and one column per width to a problem over weights.

    Weights cannot take cache widths, nor caches weight formats.  Caches cost bytes and KL only:
    nothing of further constraints.  ``weights`` becomes 0, as bytes then hold more than weights,
    and the oracle is dropped, as it measures weights only.  Per-sequence scores are kept when
    both tables have them for the same number of sequences.

    Args:
        problem: The weights, U units x F formats.
        kv: The caches, L layers x B widths.
        context: Tokens per sequence.
        batch: Sequences held at the same time.

    Returns:
        U + L units (``model.layers.0.kv_cache``, of kind ``kv_cache``) x F + B formats.

    Raises:
        ValueError: If the context or batch is not positive.
    """
    if context < 1 or batch < 1:
        raise ValueError(
            f"A KV cache of {context} tokens x {batch} sequences: both must be at least 1."
        )
    rows, columns = len(kv.layers), len(kv.bits)
    size = kv.sizes(context, batch)
    scores = None
    if (
        problem.scores is not None
        and kv.scores is not None
        and len(problem.scores) == len(kv.scores)
    ):
        scores = np.pad(problem.scores, ((0, 0), (0, rows), (0, columns)))
        scores[:, -rows:, -columns:] = kv.scores
    weights = problem.unit_weights
    return replace(
        problem,
        units=(*problem.units, *(f"{layer}.{KIND}" for layer in kv.layers)),
        formats=(*problem.formats, *kv.formats),
        bytes=_diagonal(problem.bytes, size, 0),
        loss=_diagonal(problem.loss, kv.kl, np.inf),
        weights=0,
        unit_weights=None if weights is None else np.pad(weights, (0, rows)),
        kinds=(*problem.kinds, *(KIND for _ in kv.layers)) if problem.kinds else (),
        layers=(*problem.layers, *(kv.indices or range(rows))) if problem.layers else (),
        scores=scores,
        constraints=tuple(
            replace(c, cost=np.pad(c.cost, ((0, rows), (0, columns)))) for c in problem.constraints
        ),
        oracle=None,
        bytes_option="",  # --vram holds more than these
        caches=Caches(kv.layers, kv.bits),
    )


def split_choice(
    problem: Problem, choice: NDArray[np.intp]
) -> tuple[NDArray[np.intp], dict[str, int]]:
    """Part a choice of a problem with caches.

    Args:
        problem: The problem :func:`with_kv` returned, or one without caches.
        choice: intp [U + L].

    Returns:
        The weights' choice, intp [U], whose indices are those of the weights' table, and the
        cache's bits by layer.
    """
    if problem.caches is None:
        return choice, {}
    caches = problem.caches
    units, columns = (
        len(problem.units) - len(caches.layers),
        len(problem.formats) - len(caches.bits),
    )
    widths = (caches.bits[f - columns] for f in choice[units:].tolist())
    return choice[:units], dict(zip(caches.layers, widths, strict=True))


def uniform_choices(problem: Problem) -> dict[str, NDArray[np.intp]]:
    """Every plan with one format for all weights and one width for all caches, by name.

    Names are ``int4-g64`` without caches and ``int4-g64 + kv8`` with them.  Units that may take
    only one format keep it.
    """
    caches = _caches(problem)
    if not caches.any():
        return dict(_uniform_rows(problem, ~caches))
    plans = {}
    for name, weights in _uniform_rows(problem, ~caches):
        for width, widths in _uniform_rows(problem, caches):
            plans[f"{name} + {width}"] = choice = np.empty(len(caches), dtype=np.intp)
            choice[~caches], choice[caches] = weights, widths
    return plans


def memory_budget(problem: Problem, memory: int, outside_bytes: int, context: int) -> int:
    """The most bytes weights and caches may take together in a device's memory.

    Activations and the runtime's own workspace come on top.

    Args:
        problem: The problem :func:`with_kv` returned.
        memory: Bytes of the device.
        outside_bytes: Bytes of the model outside the units, which are there as well.
        context: Tokens per sequence, for the error.

    Raises:
        ValueError: If even the smallest plan does not fit; with every part, and the longest
            context that does.
    """
    smallest = problem.smallest_bytes()
    caches = _caches(problem)
    weights, cache = int(smallest[~caches].sum()), int(smallest[caches].sum())
    missing = weights + cache + outside_bytes - memory
    if missing > 0:
        room = max(memory - weights - outside_bytes, 0)
        longest = context * room // cache if cache else 0
        raise ValueError(
            f"{format_bytes(memory)} of memory are {format_bytes(missing)} too little: the "
            f"smallest weights take {format_bytes(weights)}, the rest of the model "
            f"{format_bytes(outside_bytes)} and the smallest KV cache at {context:,} tokens "
            f"{format_bytes(cache)}. "
            + (
                f"Raise --vram, shorten --context (at most {longest:,} tokens fit) or lower "
                "--batch."
                if longest
                else "No context fits: raise --vram or allow formats with fewer bits."
            )
        )
    return memory - outside_bytes


def _caches(problem: Problem) -> NDArray[np.bool_]:
    """bool [U + L], which rows are caches."""
    count = len(problem.caches.layers) if problem.caches else 0
    return np.arange(len(problem.units)) >= len(problem.units) - count


def _diagonal(top: NDArray[T], bottom: NDArray[T], fill: float) -> NDArray[T]:
    """The block matrix [[top, fill], [fill, bottom]]."""
    rows, columns = np.add(top.shape, bottom.shape)
    blocks: NDArray[T] = np.full((rows, columns), fill, dtype=top.dtype)
    blocks[: len(top), : top.shape[1]] = top
    blocks[len(top) :, top.shape[1] :] = bottom
    return blocks


def _uniform_rows(
    problem: Problem, rows: NDArray[np.bool_]
) -> Iterator[tuple[str, NDArray[np.intp]]]:
    part = Problem(
        tuple(np.array(problem.units)[rows]),
        problem.formats,
        problem.bytes[rows],
        problem.loss[rows],
    )
    for f, name in enumerate(problem.formats):
        choice = part.uniform_choice(f)
        if choice is not None:
            yield name, choice

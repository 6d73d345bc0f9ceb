"""Renderings: what every format really makes of every weight, one store per run."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from threading import RLock
from typing import Protocol

import torch
from torch import Tensor

from .._base.memory import Room, give_back, memory_of_machine
from .._base.progress import Reporter
from .._base.tensors import bytes_of
from .._base.threads import parallel_map
from .format import Fitted, Format
from .grid import grid_rows, render
from .methods import METHODS, Evidence, rounding_device
from .packed import PackedTensor
from .rendered import Rendered, room_on
from .shelf import MEMORY, Shelf

COPIES = 8  # of what a method knows of a matrix, such as H and its factors, that it has at a time

Rows = slice | Tensor  # a range of rows, or their indices


class Evidences(Protocol):
    """Where a store gets what its rounding method needs."""

    @property
    def key(self) -> str:
        """What the evidence on a matrix depends on, besides its name: model and data, as hashes."""
        ...

    def gather(self, names: Sequence[str]) -> Iterator[Mapping[str, Evidence]]:
        """The evidence on matrices, by name: as many at a time as there is room for."""
        ...


class _Grids(OrderedDict[tuple[str, str], Fitted | None]):
    """Grids at hand, the last used ones last, and their bytes: overlays share both."""

    nbytes = 0


class Renderings:
    """The renderings of named matrices: prices, measurements and files all take them from here.

    A method whose codes are the nearest on a grid is cached as its grids, 3 bytes per weight
    group and format, and codes are recomputed.  Codes of any other method are made once and kept,
    packed; formats that it leaves alone are rounded to nearest, and handled so.

    Args:
        weight: Gives the original weight [rows, cols], float32, of a name.
        rounding: Name of the rounding method.
        folder: Where packed weights are kept, for later runs, too; see :class:`.shelf.Shelf`.
        memory: Bytes of packed weights to have at hand at a time.

    Attributes:
        rounding: Name of the rounding method.
        evidence: Where the method's evidence comes from; needed if it needs any.
        grid_bytes: Most bytes of grids at hand, the last used ones; None for all.
        device: Where all weights are, which need not be made to find out; None if not known.
    """

    def __init__(
        self,
        weight: Callable[[str], Tensor],
        rounding: str = "rtn",
        folder: Path | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.weight, self.rounding = weight, rounding
        self.evidence: Evidences | None = None
        self._method = METHODS.get(rounding)
        grid = METHODS.trait(rounding, "grid")
        self._fit_grid: Callable[[Tensor, Format], Fitted | None]
        self._fit_grid = grid or METHODS.trait("rtn", "grid")
        self._rounds: Callable[[Format], bool] = METHODS.trait(rounding, "rounds", lambda _: True)
        self._only_grids = grid is not None
        self.grid_bytes: int | None = None
        self.device: torch.device | None = None
        self._grids = _Grids()
        self._lock = RLock()
        self._shelf = Shelf(folder, memory)
        self._hashes: dict[str, str] = {}
        self._ready: set[tuple[str, str]] = set()
        self._given: dict[tuple[str, str], PackedTensor] = {}
        self._rendered = Rendered()

    @property
    def origin(self) -> str:
        """What kept codes depend on besides weight and format; empty if none are kept."""
        if self._only_grids:
            return ""
        revision = METHODS.trait(self.rounding, "revision", 1)
        return "\n".join((self.rounding, str(revision), self.evidence.key if self.evidence else ""))

    def keeps(self, fmt: Format) -> bool:
        """Whether codes of a format are kept, rather than recomputed by rounding."""
        return not self._only_grids and self._rounds(fmt)

    def put(self, name: str, fmt: Format, packed: PackedTensor) -> None:
        """Hand in a rendering, which is given for that matrix in that format from now on.

        It is held in memory and goes with the store: whoever made it keeps it for later runs.

        Raises:
            ValueError: If it has another format or shape.
        """
        shape = tuple(self.weight(name).shape)
        if packed.fmt != fmt or packed.shape != shape:
            raise ValueError(
                f"The rendering handed in for {name!r} in {fmt}, {list(shape)}, is in {packed.fmt} "
                f"and {list(packed.shape)}."
            )
        self._given[name, fmt.name] = packed

    def overlay(self) -> Renderings:
        """A store with all that this one has and will have, but for what either is handed in."""
        other = copy(self)
        other._given = dict(self._given)
        return other

    def fit(
        self, names: Sequence[str], formats: Sequence[Format], reporter: Reporter | None = None
    ) -> None:
        """Make the renderings of all matrices in all formats that are not there yet.

        Raises:
            ValueError: If a weight cannot be rounded, or evidence is needed and there is none.
        """
        reporter = reporter or Reporter(quiet=True)
        self.complete(((name, fmt) for name in names for fmt in formats), reporter)
        fitted = [fmt for fmt in formats if not self.keeps(fmt)]
        if not fitted or self.grid_bytes is not None:  # those are fitted when they are needed
            return

        def work(name: str) -> None:
            for fmt in fitted:
                self._grid(name, fmt)

        sizes = [self.weight(name).numel() for name in names]
        with reporter.bar("Fitting scales", len(names), sizes) as advance:
            for _ in parallel_map(work, names, self.weight(names[0]).device):
                advance(1)

    def complete(
        self, pairs: Iterable[tuple[str, Format]], reporter: Reporter | None = None
    ) -> None:
        """Round what is to be kept of these matrices in these formats and is not there yet.

        Evidence is gathered by running the model: this comes before the model runs otherwise.
        """
        missing: dict[str, list[Format]] = {}
        for name, fmt in pairs:
            if self.keeps(fmt) and not self._has(name, fmt):
                missing.setdefault(name, []).append(fmt)
        if not missing:
            return
        reporter = reporter or Reporter(quiet=True)
        for evidences in self._gather(list(missing)):
            self._round_all(evidences, missing, reporter)
            del evidences  # before the next are gathered
            give_back()

    def prepare(self, name: str, fmt: Format) -> None:
        """Make one rendering, unless it is there."""
        if (name, fmt.name) in self._given:
            return
        if self.keeps(fmt):
            self.complete([(name, fmt)])
        else:
            self._grid(name, fmt)

    def rows(
        self, name: str, fmt: Format, rows: Rows = slice(None), out: Tensor | None = None
    ) -> Tensor:
        """The dequantized rows of a matrix in a format, float32 [rows, cols]."""
        if self.device is not None and not room_on(self.device):
            return self._dequantized(name, fmt, rows, out)
        weight, given = self.weight(name), self._given.get((name, fmt.name))
        whole = self._rendered.get(
            (name, fmt.name), given, weight, lambda: self._dequantized(name, fmt)
        )
        if whole is None:
            return self._dequantized(name, fmt, rows, out)
        return whole[rows].clone() if out is None else out.copy_(whole[rows])

    def _dequantized(
        self, name: str, fmt: Format, rows: Rows = slice(None), out: Tensor | None = None
    ) -> Tensor:
        if not self.keeps(fmt) and (name, fmt.name) not in self._given:
            weight = self.weight(name)[rows]
            return render(weight, fmt, grid_rows(self._grid(name, fmt), rows), out)
        found = self.packed(name, fmt).dequantize(rows)
        return found if out is None else out.copy_(found)

    def packed(self, name: str, fmt: Format) -> PackedTensor:
        """A matrix as it is stored in a format: decodes to :meth:`rows` bit for bit."""
        if (given := self._given.get((name, fmt.name))) is not None:
            return given
        if not self.keeps(fmt):
            return PackedTensor.pack(self.weight(name), fmt, self._grid(name, fmt))
        self.prepare(name, fmt)
        packed = self._shelf.get(self._key(name, fmt), self._device_of(name))
        assert packed is not None, f"{name} was rounded to {fmt}, but is not on the shelf"
        return packed

    def round(self, name: str, fmt: Format, weight: Tensor, evidence: Evidence) -> PackedTensor:
        """What the method makes of a weight in place of a named one; it is not kept.

        Args:
            name: The matrix that it is for.
            fmt: The format.
            weight: The weight [rows, cols], float32.
            evidence: What the method may know of it.

        Raises:
            ValueError: If it cannot be rounded.
        """
        place = rounding_device(self.rounding, weight.device)
        found = self._rounded(name, fmt, weight.to(place), evidence.to(place))
        return found.to(weight.device)

    def digest(self, assignment: Mapping[str, Format]) -> str | None:
        """SHA-256 of all kept and handed in renderings of an assignment; None if it has none."""
        pairs = [
            (name, fmt)
            for name, fmt in sorted(assignment.items())
            if self.keeps(fmt) or (name, fmt.name) in self._given
        ]
        if not pairs:
            return None
        self.complete(pairs)
        digest = hashlib.sha256()
        for name, fmt in pairs:
            digest.update(f"{name} {fmt.name}\n".encode())
            for _, part in sorted(self.packed(name, fmt).tensors.items()):
                digest.update(bytes_of(part))
        return digest.hexdigest()

    def _grid(self, name: str, fmt: Format) -> Fitted | None:
        key = (name, fmt.name)
        with self._lock:
            if key in self._grids:
                self._grids.move_to_end(key)
                return self._grids[key]
        try:
            grid = self._fit_grid(self.weight(name), fmt)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
        with self._lock:
            if key not in self._grids:
                self._grids[key] = grid
                self._grids.nbytes += _nbytes(grid)
            limit = self.grid_bytes
            while limit is not None and self._grids.nbytes > limit and len(self._grids) > 1:
                self._grids.nbytes -= _nbytes(self._grids.popitem(last=False)[1])
        return grid

    def _gather(self, names: Sequence[str]) -> Iterator[Mapping[str, Evidence]]:
        needs = METHODS.trait(self.rounding, "needs", ())
        if self.evidence is not None:
            yield from self.evidence.gather(names)
        elif needs:
            raise ValueError(
                f"Rounding by {self.rounding!r} needs {' and '.join(sorted(needs))} of the model's "
                "inputs, and no calibration data were given."
            )
        else:
            yield dict.fromkeys(names, Evidence())

    def _round_all(
        self,
        evidences: Mapping[str, Evidence],
        formats: Mapping[str, Sequence[Format]],
        reporter: Reporter,
    ) -> None:
        device = self.weight(next(iter(evidences))).device
        place = rounding_device(self.rounding, device)
        self._shelf.memory = max(self._shelf.memory, room_on(device))
        room = Room(memory_of_machine() // 2)

        def work(name: str) -> None:
            rows, cols = self.weight(name).shape
            with room.take(4 * COPIES * cols * max(rows, cols)):  # experts: cols^2 for each
                weight, evidence = self.weight(name).to(place), evidences[name].to(place)
                for fmt in formats[name]:
                    packed = self._rounded(name, fmt, weight, evidence).to(device)
                    self._shelf.put(self._key(name, fmt), packed)
                    self._ready.add((name, fmt.name))

        sizes = [self.weight(name).numel() for name in evidences]
        with reporter.bar(f"Rounding ({self.rounding})", len(sizes), sizes) as advance:
            for _ in parallel_map(work, list(evidences), place):
                advance(1)

    def _rounded(self, name: str, fmt: Format, weight: Tensor, evidence: Evidence) -> PackedTensor:
        try:
            return self._method(weight, fmt, evidence)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error

    def _has(self, name: str, fmt: Format) -> bool:
        pair = (name, fmt.name)
        if pair in self._given:
            return True
        if pair not in self._ready:
            device = self._device_of(name)
            if self._shelf.get(self._key(name, fmt), device) is not None:
                self._ready.add(pair)
        return pair in self._ready

    def _device_of(self, name: str) -> torch.device:
        return self.device or self.weight(name).device

    def _key(self, name: str, fmt: Format) -> str:
        """What the codes of a matrix in a format depend on, as a hash."""
        if name not in self._hashes:
            self._hashes[name] = hashlib.sha256(bytes_of(self.weight(name))).hexdigest()
        parts = (self.origin, fmt.name, self._hashes[name], name if self.evidence else "")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _nbytes(grid: Fitted | None) -> int:
    """Bytes of what a family keeps of a weight."""
    parts: tuple[object, ...] = grid if isinstance(grid, tuple) else ()
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))

"""A model run with the weights that formats really produce."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .._base.progress import Reporter
from ..quantizers.format import Format, family_of
from ..quantizers.store import Renderings, Rows
from .lazy import LazyWeight
from .sites import Place, entries_of, places
from .streamed import InPlaceOf, float32_is_held, float32_of, is_streamed, pack, packing, unpack
from .substitute import Read, substituted
from .units import Part, UnitInfo

Assignment = Mapping[str, Format]  # part name -> format

GRIDS = 1 << 28  # bytes of fitted scales at hand of a model that stays in its files
COPIES = 1 << 27  # bytes of matrices at hand that are no views of their parameters, beyond the last


class Renderer:
    """Runs a model with any unit's matrix in any format, without keeping rendered weights.

    Args:
        model: The module that holds the original weights.
        units: The units; only their matrices are rendered.
        rounding: Name of the rounding method.
        folder: Where the store keeps codes that cannot be recomputed; None for memory.

    Attributes:
        store: The renderings.
        units: The units.
        parts: The parts of the units by name.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[UnitInfo],
        rounding: str = "rtn",
        folder: Path | None = None,
    ) -> None:
        self.units = tuple(units)
        known = {place.name: place for place in places(model)}
        self.parts: dict[str, Part] = {part.name: part for unit in units for part in unit.parts}
        self._names: dict[str, list[str]] = {}  # matrix -> its parts
        for part in self.parts.values():
            self._names.setdefault(part.module, []).append(part.name)
        self._places = {name: [known[name]] for name in self._names}
        owners = {id(place[0].parameter): name for name, place in self._places.items()}
        aliases = {alias for unit in units for alias in unit.aliases}
        for place in known.values():
            if place.name in aliases:
                self._places[owners[id(place.parameter)]].append(place)
        self._copied: OrderedDict[str, tuple[int, Tensor]] = OrderedDict()
        self._lock = Lock()
        self._refusals: dict[tuple[str, str], str | None] = {}
        self._ends: dict[str, Tensor] = {}  # the smallest and the largest weight of a part
        self.store = Renderings(self.weight, rounding, folder)
        if is_streamed(model):
            self.store.grid_bytes = GRIDS
            self.store.device = torch.device("cpu")

    def overlay(self) -> Renderer:
        """The same, with a store that may be handed renderings of its own."""
        other = copy(self)
        other.store = self.store.overlay()
        return other

    @property
    def names(self) -> list[str]:
        """Names of the parts, in unit order."""
        return list(self.parts)

    def places(self) -> Iterator[tuple[str, list[Place]]]:
        """Every matrix with the places it is used in, the one it is named after first."""
        yield from self._places.items()

    def parts_of(self, matrix: str) -> list[Part]:
        """The parts of a matrix."""
        return [self.parts[name] for name in self._names[matrix]]

    def place(self, name: str) -> Place:
        """The place that the matrix of a part is named after."""
        return self._places[self.parts[name].module][0]

    def hooked_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Pairs of part name and module; tied modules appear under one name."""
        for matrix, used in self._places.items():
            for name in self._names[matrix]:
                for module in {id(place.module): place.module for place in used}.values():
                    yield name, module

    def weight(self, name: str) -> Tensor:
        """The original weight of a part [rows, cols], a view where possible."""
        part = self.parts[name]
        matrix = self._matrix(part.module)
        return matrix if part.rows is None else rows_of(matrix, part)

    def fit(self, formats: Sequence[Format], reporter: Reporter | None = None) -> None:
        """Make the renderings of all matrices that are not there yet."""
        able = {name: [f for f in formats if not self.refusal(name, f)] for name in self.names}
        alike = [name for name, some in able.items() if len(some) == len(formats)]
        if alike:
            self.store.fit(alike, formats, reporter)
        for name in able.keys() - alike:
            self.store.fit([name], able[name])

    def complete(self, formats: Sequence[Format], reporter: Reporter | None = None) -> None:
        """:meth:`fit` for the formats whose codes are kept; the others are fitted when needed."""
        pairs = ((name, fmt) for name in self.names for fmt in formats)
        self.store.complete((pair for pair in pairs if not self.refusal(*pair)), reporter)

    def prepare(self, name: str, fmt: Format) -> None:
        """Make one rendering, unless it is there or cannot be."""
        if not self.refusal(name, fmt):
            self.store.prepare(name, fmt)

    def refusal(self, name: str, fmt: Format) -> str | None:
        """Why a format cannot hold a part, a weight too large for its scales; None if it can."""
        key = (name, fmt.name)
        if key not in self._refusals:
            if name not in self._ends:
                self._ends[name] = torch.stack(self.weight(name).aminmax())[None]
            try:
                family_of(fmt).check(self._ends[name], fmt)
                self._refusals[key] = None
            except ValueError as error:
                self._refusals[key] = f"{name!r}: {error}"
        return self._refusals[key]

    def render(
        self, name: str, fmt: Format, rows: Rows = slice(None), out: Tensor | None = None
    ) -> Tensor:
        """The dequantized rows of a part in a format, float32 [rows, cols].

        Zeros where the format cannot hold the part: what is made of them stands for no price.
        """
        if self.refusal(name, fmt):
            zeros = torch.zeros_like(self.weight(name)[rows])
            return zeros if out is None else out.zero_()
        return self.store.rows(name, fmt, rows, out)

    @contextmanager
    def applied(self, assignment: Assignment, hold: bool = False) -> Iterator[None]:
        """Run the model with rendered weights inside the block.

        Whoever reads a weight, its module or another one, gets the rendered one, which is made
        when it is read and forgotten when the next one is; a backward pass renders it again.

        Args:
            assignment: The formats.
            hold: Keep what is rendered until the end instead.
        """
        self.store.complete(assignment.items())  # runs the model, so not while it is changed
        swap = _Swap(self, assignment, hold)
        reads: list[tuple[Place, Read]] = [
            (place, swap.reader(matrix, place))
            for matrix, used in self._places.items()
            if any(name in assignment for name in self._names[matrix])
            for place in used
        ]
        with ExitStack() as undo:
            if torch.is_grad_enabled():
                undo.enter_context(packing(swap.pack, swap.unpack))
            undo.enter_context(substituted(reads))
            yield

    def assembled(self, matrix: str, assignment: Assignment) -> Tensor:
        """A whole matrix [rows, cols] as its parts are rendered."""
        parts = self.parts_of(matrix)
        if len(parts) == 1 and parts[0].rows is None:
            return self.render(matrix, assignment[matrix])
        result = self._matrix(matrix).clone()
        for part in parts:
            if part.name in assignment:
                rendered, start = self.render(part.name, assignment[part.name]), 0
                for first, stop in part.rows or ():
                    result[first:stop] = rendered[start : start + stop - first]
                    start += stop - first
        return result

    def _matrix(self, name: str) -> Tensor:
        """The original matrix; where it is no view of the parameter, the last ones are kept."""
        place = self._places[name][0]
        parameter = place.parameter.detach()
        version = parameter._version
        with self._lock:
            kept = self._copied.get(name)
            if kept is not None and kept[0] == version:
                self._copied.move_to_end(name)
                return kept[1]
        held = float32_is_held(parameter)
        source = float32_of(parameter)
        matrix = place.matrix(source)
        address = matrix.untyped_storage().data_ptr()
        if address != (source if held else parameter).untyped_storage().data_ptr():
            with self._lock:
                self._copied[name] = version, matrix
                while len(self._copied) > 1 and _nbytes(self._copied) > COPIES:
                    self._copied.popitem(last=False)
        return matrix


def _nbytes(copied: Mapping[str, tuple[int, Tensor]]) -> int:
    return sum(matrix.nbytes for _, matrix in copied.values())


def rows_of(matrix: Tensor, part: Part) -> Tensor:
    """The rows of a matrix that a part has: a view if they lie together."""
    assert part.rows is not None
    pieces = [matrix[start:stop] for start, stop in part.rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _Swap:
    """What is read in place of the weights of one plan.

    What a backward pass needs of a rendered weight is rendered again when it is needed.
    """

    def __init__(self, renderer: Renderer, assignment: Assignment, hold: bool) -> None:
        self.renderer, self.assignment = renderer, assignment
        self.held: dict[str, Tensor] | None = {} if hold else None
        self.last: tuple[str, Tensor] | None = None
        self.matrices: dict[int, str] = {}  # address of a rendered matrix that exists -> its name
        self.alive: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def reader(self, matrix: str, place: Place) -> Read:
        """What gives the rendered weight in the shape of a parameter."""
        whole = self.assignment.get(matrix)

        def read(_module: nn.Module) -> Any:
            parameter = place.parameter
            if torch.is_grad_enabled() and parameter.requires_grad:
                standing_in: Any = InPlaceOf.apply
                return standing_in(parameter, place.restored(self.rendered(matrix)))
            if place.site.by_index and whole is not None:
                like = torch.empty(0, device=parameter.device)
                return LazyWeight(torch.Size(parameter.shape), like, dense, some)
            return dense()

        def dense() -> Tensor:
            return place.restored(self.rendered(matrix))

        def some(entries: Tensor) -> Tensor:
            assert whole is not None
            shape, render = place.parameter.shape, partial(self.renderer.render, matrix, whole)
            return entries_of(place.site, place.module, place.attribute, shape, entries, render)

        return read

    def rendered(self, matrix: str) -> Tensor:
        """A rendered matrix; the last one is kept, for who reads a weight more than once."""
        if self.held is not None and matrix in self.held:
            return self.held[matrix]
        if self.last is None or self.last[0] != matrix:
            self.last = None  # before the next one is made
            tensor = self.renderer.assembled(matrix, self.assignment)
            address = tensor.untyped_storage().data_ptr()
            self.last, self.alive[address], self.matrices[address] = (
                (matrix, tensor),
                tensor,
                matrix,
            )
            if self.held is not None:
                self.held[matrix] = tensor
        return self.last[1]

    def pack(self, tensor: Tensor) -> Any:
        """Save a view of a rendered matrix as what it is a view of."""
        if not self.alive or tensor.layout != torch.strided:
            return pack(tensor)
        address = tensor.untyped_storage().data_ptr()
        if address not in self.alive:
            return pack(tensor)
        shape = (tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return _View(self.matrices[address], *shape)

    def unpack(self, saved: Any) -> Tensor:
        """Invert :meth:`pack`."""
        if not isinstance(saved, _View):
            return unpack(saved)
        matrix = self.renderer.assembled(saved.matrix, self.assignment)
        return matrix.as_strided(saved.size, saved.stride, saved.offset)


class _View(NamedTuple):
    """How a saved tensor looks at the storage of a rendered matrix."""

    matrix: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a unit's module, however the model passes it."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value

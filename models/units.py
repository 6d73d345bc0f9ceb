"""Units: the smallest things that get one format, as data without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

Ranges = tuple[tuple[int, int], ...]  # rows of a matrix: [start, stop) after [start, stop)


@dataclass(frozen=True, slots=True)
class Part:
    """What a unit is made of: a whole matrix, or some rows of one.

    Attributes:
        name: The key in a plan: the matrix's own name, or ``matrix[rows:k]``.
        module: Name of the matrix: the path of its parameter without a trailing ``.weight``.
        shape: ``(rows, cols)`` of the part.
        rows: Which rows of the matrix, in this order; None for all.
    """

    name: str
    module: str
    shape: tuple[int, int]
    rows: Ranges | None = None


@dataclass(frozen=True, slots=True)
class UnitInfo:
    """The torch-free description of a unit: one or more matrices that share one format.

    Attributes:
        name: Unique name; the module's name, or ``parent.{a,b}`` for a fused group.
        modules: Names of the parts: canonical names of distinct weight matrices, or
            ``matrix[rows:k]`` for some rows of one.
        shapes: ``(rows, cols)`` of each part, rows = output features.
        kind: Matrix type, the part of the name shared across layers (``mlp.up_proj``).
        layer: Index of the layer the unit belongs to, or None outside the repeated stack.
        aliases: Other module names tied to the same weight (``lm_head``), stored once.
        rows: Which rows each part has of its matrix, None for all; empty if all parts are whole.
    """

    name: str
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    kind: str
    layer: int | None = None
    aliases: tuple[str, ...] = ()
    rows: tuple[Ranges | None, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights, counted once when tied."""
        return sum(rows * cols for rows, cols in self.shapes)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the unit is made of."""
        rows = self.rows or (None,) * len(self.modules)
        return tuple(
            Part(name, matrix_name(name), shape, some)
            for name, shape, some in zip(self.modules, self.shapes, rows, strict=True)
        )

    def row_ranges(self) -> tuple[Ranges | None, ...]:
        """:attr:`rows` with an entry for every part."""
        return self.rows or (None,) * len(self.modules)


def matrix_name(part: str) -> str:
    """The matrix that a part is of: ``experts.up[rows:3]`` gives ``experts.up``."""
    return part.partition("[rows:")[0]


def part_name(matrix: str, number: int) -> str:
    """The name of the part with a number: ``experts.up[rows:3]``."""
    return f"{matrix}[rows:{number}]"


def row_count(ranges: Ranges) -> int:
    """Rows in ranges."""
    return sum(stop - start for start, stop in ranges)


def ranges_fault(ranges: Ranges) -> str | None:
    """What is wrong with the rows of a part; None if nothing is."""
    if not ranges or any(not 0 <= start < stop for start, stop in ranges) or overlap([ranges]):
        return f"rows are ranges that do not overlap, each with rows, not {list(ranges)}"
    return None


def overlap(row_sets: Iterable[Ranges]) -> tuple[int, int] | None:
    """The first rows that two parts of a matrix share; None if there are none."""
    everything = sorted(pair for ranges in row_sets for pair in ranges)
    for (_, before), (start, stop) in pairwise(everything):
        if start < before:
            return start, min(before, stop)
    return None


def check_row_sets(matrix: str, rows: int, row_sets: Iterable[Ranges]) -> None:
    """Find out whether parts are all rows of a matrix, each once.

    Raises:
        ValueError: If they are not; matrix and rows are named.
    """
    row_sets = list(row_sets)
    last = max(stop for ranges in row_sets for _, stop in ranges)
    wrong = f"The parts of {matrix!r}, which has rows 0 to {rows - 1},"
    if shared := overlap(row_sets):
        raise ValueError(f"{wrong} share rows {shared[0]} to {shared[1] - 1}. Give each row once.")
    if last > rows:
        raise ValueError(f"{wrong} have row {last - 1}. Give rows that there are.")
    end = 0
    for start, stop in sorted(pair for ranges in row_sets for pair in ranges):
        if start > end:
            break
        end = stop
    else:
        start = rows
    if end < rows:
        raise ValueError(f"{wrong} lack rows {end} to {start - 1}. Give these a part of their own.")


def split_rows(
    unit: UnitInfo, row_sets: Sequence[Ranges] | Mapping[str, Ranges]
) -> tuple[UnitInfo, ...]:
    """Units that are some rows each of the one matrix of a unit.

    Args:
        unit: A unit of one whole matrix.
        row_sets: The rows of every new unit, by the name of the part if not numbered from 0;
            together all rows of the matrix, each once.

    Raises:
        ValueError: If the unit has more matrices than one, or the rows are not all of its rows.

    Example:
        >>> unit = UnitInfo("up", ("up",), ((320, 64),), "up")
        >>> for part in split_rows(unit, [((0, 128), (256, 320)), ((128, 256),)]):
        ...     print(part.name, part.shapes, part.rows)
        up[rows:0] ((192, 64),) (((0, 128), (256, 320)),)
        up[rows:1] ((128, 64),) (((128, 256),),)
    """
    if len(unit.modules) != 1 or unit.rows:
        raise ValueError(
            f"{unit.name!r} has {len(unit.modules)} parts already: only a unit of one whole matrix "
            "can be split by rows."
        )
    (matrix,), ((rows, cols),) = unit.modules, unit.shapes
    if not isinstance(row_sets, Mapping):
        row_sets = {part_name(matrix, i): ranges for i, ranges in enumerate(row_sets)}
    for name, ranges in row_sets.items():
        if fault := ranges_fault(ranges):
            raise ValueError(f"{name!r}: {fault}.")
    check_row_sets(matrix, rows, row_sets.values())
    return tuple(
        replace(
            unit,
            name=name,
            modules=(name,),
            shapes=((row_count(ranges), cols),),
            rows=(tuple(ranges),),
        )
        for name, ranges in row_sets.items()
    )


def whole_matrices(units: Sequence[UnitInfo]) -> list[UnitInfo]:
    """The units with one for all parts of a matrix together, in the place of the first.

    Args:
        units: Units of one part each; those of a matrix are all of its rows.
    """
    found: dict[str, UnitInfo] = {}
    for unit in units:
        ((rows, cols),), name = unit.shapes, unit.parts[0].module
        if name in found:
            rows += found[name].shapes[0][0]
        found[name] = replace(unit, name=name, modules=(name,), shapes=((rows, cols),), rows=())
    return list(found.values())


def by_matrix(row_sets: Mapping[str, Ranges]) -> dict[str, dict[str, Ranges]]:
    """Matrix -> its parts with their rows, of rows by part."""
    found: dict[str, dict[str, Ranges]] = {}
    for name, ranges in row_sets.items():
        found.setdefault(matrix_name(name), {})[name] = ranges
    return found


def module_kinds(unit: UnitInfo) -> tuple[str, ...]:
    """The matrix type of every module of a unit: ``attn.{q,k}`` gives ``attn.q``, ``attn.k``."""
    parent, brace, names = unit.kind.partition("{")
    if not brace:
        return (unit.kind,) * len(unit.modules)
    kinds = names.removesuffix("}").split(",")
    each = len(unit.modules) // len(kinds)  # the experts in a list are all of one kind
    return tuple(parent + kind for kind in kinds for _ in range(each))

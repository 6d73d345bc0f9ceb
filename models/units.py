"""Units: the smallest things that get one format, as data without a model."""

from __future__ import annotations

from dataclasses import dataclass

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


def module_kinds(unit: UnitInfo) -> tuple[str, ...]:
    """The matrix type of every module of a unit: ``attn.{q,k}`` gives ``attn.q``, ``attn.k``."""
    parent, brace, names = unit.kind.partition("{")
    if not brace:
        return (unit.kind,) * len(unit.modules)
    return tuple(parent + name for name in names.removesuffix("}").split(","))

"""Units: the smallest things that get one format, as data without a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UnitInfo:
    """The torch-free description of a unit: one or more matrices that share one format.

    Attributes:
        name: Unique name; the module's name, or ``parent.{a,b}`` for a fused group.
        modules: Canonical module names, one per distinct weight matrix.
        shapes: ``(rows, cols)`` of each matrix, rows = output features.
        kind: Matrix type, the part of the name shared across layers (``mlp.up_proj``).
        layer: Index of the layer the unit belongs to, or None outside the repeated stack.
        aliases: Other module names tied to the same weight (``lm_head``), stored once.
    """

    name: str
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    kind: str
    layer: int | None = None
    aliases: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights, counted once when tied."""
        return sum(rows * cols for rows, cols in self.shapes)


def module_kinds(unit: UnitInfo) -> tuple[str, ...]:
    """The matrix type of every module of a unit: ``attn.{q,k}`` gives ``attn.q``, ``attn.k``."""
    parent, brace, names = unit.kind.partition("{")
    if not brace:
        return (unit.kind,) * len(unit.modules)
    return tuple(parent + name for name in names.removesuffix("}").split(","))

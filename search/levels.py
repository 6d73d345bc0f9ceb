"""Formats as levels in order of bytes: what searches without a loss table move along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .problem import NO_BYTES, Problem

BANDS = 3  # parts of the depth that share a variable
MAX_GROUPS = 48
POWER = 5  # of a preference: fine near "like the others", yet every format is in reach


@dataclass(frozen=True, slots=True)
class Ladder:
    """The allowed formats of every unit from the fewest bytes to the most.

    Attributes:
        format: intp [U, F], the format at every level; beyond ``top`` the rest.
        bytes: int64 [U, F], stored bytes at every level.
        top: intp [U], the highest level.
    """

    format: NDArray[np.intp]
    bytes: NDArray[np.int64]
    top: NDArray[np.intp]

    @classmethod
    def build(cls, problem: Problem) -> Ladder:
        """Sort the allowed formats of every unit; of equal bytes the first format is lower.

        Raises:
            ValueError: If the problem has constraints besides the bytes, which levels ignore.
        """
        if problem.constraints:
            names = ", ".join(constraint.name for constraint in problem.constraints)
            raise ValueError(
                f"Searches on measured KL keep to a number of bytes and nothing else, and this "
                f"problem also limits {names}. Drop that limit or use a solver that takes it."
            )
        size = np.where(problem.allowed, problem.bytes, NO_BYTES)
        order = size.argsort(axis=1, kind="stable")
        return cls(order, np.take_along_axis(size, order, axis=1), problem.allowed.sum(axis=1) - 1)

    def choice(self, level: NDArray[np.intp]) -> NDArray[np.intp]:
        """intp [U], the formats at ``level`` [U]."""
        chosen: NDArray[np.intp] = self.format[np.arange(len(level)), level]
        return chosen

    def level(self, choice: NDArray[np.intp]) -> NDArray[np.intp]:
        """intp [U], the levels of the formats ``choice`` [U]."""
        found: NDArray[np.intp] = (self.format == choice[:, None]).argmax(axis=1)
        return found

    def size(self, level: NDArray[np.intp]) -> int:
        """Stored bytes at ``level`` [U]."""
        return int(self.bytes[np.arange(len(level)), level].sum())

    def climb(
        self,
        level: NDArray[np.intp],
        units: NDArray[np.intp],
        below: NDArray[np.intp],
        max_bytes: int,
    ) -> NDArray[np.intp]:
        """Raise units one level each, in order, as long as the bytes last.

        A step that does not fit stops its unit; the others go on.

        Args:
            level: intp [U], where to begin, within ``max_bytes``.
            units: intp [K], the unit of every step.
            below: intp [K], the level that the step leaves, under the unit's top one.
            max_bytes: The most bytes the result may take.

        Returns:
            intp [U], the levels reached.
        """
        level = level.copy()
        slack = max_bytes - self.size(level)
        extra = self.bytes[units, below + 1] - self.bytes[units, below]
        fits = int(np.searchsorted(extra.cumsum(), slack, side="right"))
        np.add.at(level, units[:fits], 1)
        slack -= int(extra[:fits].sum())
        rest = np.flatnonzero(extra[fits:] <= slack) + fits
        steps = (units[rest].tolist(), below[rest].tolist(), extra[rest].tolist())
        for unit, source, size in zip(*steps, strict=True):
            if size <= slack and level[unit] == source:
                level[unit] += 1
                slack -= size
        return level


@dataclass(frozen=True, slots=True)
class Groups:
    """Units that a black-box search moves together, one variable per group.

    A variable in -1..1 is a group's preference: how many formats it is ahead of (or behind) a
    group at 0, as a fraction of all formats, to the power of 1 / POWER.

    Attributes:
        names: The G variables, such as ``mlp.up_proj 0-9`` (its layers).
        ladder: The levels of all units.
        group: intp [U], the group of every unit; 0 where there is no choice.
        threshold: float64 [U, F - 1], the place on the scale of all formats (0 is the smallest,
            1 the next) from which a unit is above a level; inf from its highest level on.
    """

    names: tuple[str, ...]
    ladder: Ladder
    group: NDArray[np.intp]
    threshold: NDArray[np.float64]

    @classmethod
    def build(cls, problem: Problem) -> Groups:
        """Group units by kind and third of the depth; without kinds, by neighbourhood."""
        ladder = Ladder.build(problem)
        free = np.flatnonzero(ladder.top > 0)
        labels = _labels(problem, free)
        names = tuple(dict.fromkeys(labels))
        group = np.zeros(len(problem.units), dtype=np.intp)
        group[free] = [names.index(label) for label in labels]

        place = np.empty(len(problem.formats))
        place[problem.bytes.sum(axis=0).argsort(kind="stable")] = np.arange(len(place))
        at = place[ladder.format]
        threshold = (at[:, :-1] + at[:, 1:]) / 2
        threshold[np.arange(threshold.shape[1]) >= ladder.top[:, None]] = np.inf
        # A unit whose own order of bytes differs from the common one still climbs level by level.
        return cls(names, ladder, group, np.maximum.accumulate(threshold, axis=1))

    def fit(self, preferences: Mapping[str, float], max_bytes: int, seed: int) -> NDArray[np.intp]:
        """intp [U], the choice by ``preferences`` (-1..1 per group) that fills ``max_bytes``.

        Starting from the smallest plan, the common place of all groups rises until the next step
        does not fit; the units of a group then rise one by one in an order drawn from ``seed``,
        and later steps that still fit spend the bytes left.  So only differences between
        groups matter, and every allocation by group is reached by some preferences.
        """
        ahead = np.zeros(len(self.group))
        if self.names:
            x = np.array([preferences[name] for name in self.names])
            ahead = (self.threshold.shape[1] * x**POWER)[self.group]
        wait = self.threshold - ahead[:, None]
        lot = np.random.default_rng(seed).permutation(len(wait))
        unit, below = np.nonzero(wait < np.inf)
        order = np.lexsort((below, lot[unit], wait[unit, below]))
        lowest = np.zeros(len(wait), dtype=np.intp)
        return self.ladder.choice(self.ladder.climb(lowest, unit[order], below[order], max_bytes))


def _labels(problem: Problem, units: NDArray[np.intp]) -> list[str]:
    """The group of each of ``units``, by name; MAX_GROUPS different ones at most."""
    if problem.kinds and problem.layers:
        depth = 1 + max((layer for layer in problem.layers if layer is not None), default=0)
        for bands in range(BANDS, 0, -1):
            edges = np.linspace(0, depth, bands + 1).astype(int)
            labels = [_label(problem.kinds[u], problem.layers[u], edges) for u in units.tolist()]
            if len(set(labels)) <= MAX_GROUPS:
                return labels
    parts = np.array_split(units, min(len(units), MAX_GROUPS)) if len(units) else []
    ends = [dict.fromkeys((problem.units[part[0]], problem.units[part[-1]])) for part in parts]
    return [" - ".join(names) for names, part in zip(ends, parts, strict=True) for _ in part]


def _label(kind: str, layer: int | None, edges: NDArray[np.int_]) -> str:
    if layer is None:
        return kind
    band = int(np.searchsorted(edges, layer, side="right"))
    return f"{kind} {edges[band - 1]}-{edges[band] - 1}"

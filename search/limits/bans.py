"""``--ban 'GLOB=FORMATS'``: formats that units must not take."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...sensitivity.table import SensitivityTable
from ..matching import format_index, nearest, unit_names
from ._kinds import LIMITS, Limit, Refusal

if TYPE_CHECKING:
    from . import Limits


class Bans(Limit):
    """Formats, or globs on them, that some units must not take."""

    def refusals(self, table: SensitivityTable, limits: Limits) -> Iterator[Refusal]:
        """One per glob and format, in the order they were given."""
        names = unit_names(table.units)
        for glob, patterns in limits.bans.items():
            units = names.find(glob, "--ban")
            for pattern in patterns:
                banned = _matching_formats(table, pattern)
                yield Refusal(f"--ban '{glob}={pattern}'", units[:, None] & banned)


def _matching_formats(table: SensitivityTable, pattern: str) -> NDArray[np.bool_]:
    found = np.array([fnmatchcase(name, pattern) for name in table.formats])
    if pattern == "keep":
        found[format_index(table, pattern)] = True
    if not found.any():
        raise ValueError(
            f"--ban {pattern!r} matches no format of the profile.{nearest(pattern, table.formats)} "
            f"It has {', '.join(table.formats)}."
        )
    return found


LIMITS.register("bans")(Bans())

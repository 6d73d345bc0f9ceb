"""``--min 'GLOB=FORMAT'``: the least bits per code of some units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...sensitivity.table import SensitivityTable
from ..matching import unit_names
from ._kinds import LIMITS, Limit, Refusal, bits_of, widths

if TYPE_CHECKING:
    from . import Limits


class LeastBits(Limit):
    """Formats of fewer bits per code than some units may take."""

    def refusals(self, table: SensitivityTable, limits: Limits) -> Iterator[Refusal]:
        """One per glob, in the order they were given."""
        names = unit_names(table.units)
        for glob, name in limits.at_least.items():
            outside = widths(table) < bits_of(table, name)
            units = names.find(glob, "--min")
            yield Refusal(f"--min '{glob}={name}'", units[:, None] & outside)


LIMITS.register("least")(LeastBits())

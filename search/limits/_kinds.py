"""What every kind of limit is: options it refuses, or costs whose sum it bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..._base.registry import Registry
from ...quantizers.format import Format
from ...sensitivity.table import SensitivityTable
from ..matching import format_index
from ..problem import Constraint

if TYPE_CHECKING:
    from . import Limits

_BARE = re.compile(r"int([1-8])")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A limit as the user wrote it, and the options it refuses: bool [U, F].

    ``runtime`` says that it is a runtime's, which can tell why.
    """

    text: str
    mask: NDArray[np.bool_]
    runtime: bool = False


class Limit:
    """One kind of limit; it does what its methods say and reads what it needs of ``Limits``."""

    def refusals(self, table: SensitivityTable, limits: Limits) -> Iterator[Refusal]:
        """Options that units must not take.

        Raises:
            ValueError: If a glob matches nothing, or a format is unknown.
        """
        yield from ()

    def constraints(
        self, table: SensitivityTable, limits: Limits, allowed: NDArray[np.bool_]
    ) -> Iterator[Constraint]:
        """Costs whose sum over the units has a limit.

        Args:
            table: The sensitivity table.
            limits: The limits.
            allowed: bool [U, F], the options that need a cost.

        Raises:
            ValueError: If an allowed option has no cost.
        """
        yield from ()


LIMITS: Registry[Limit] = Registry("limit", __name__.rpartition(".")[0])


def widths(table: SensitivityTable) -> NDArray[np.int64]:
    """int64 [F], bits per code of every format."""
    return np.array([Format.parse(name).bits for name in table.formats], dtype=np.int64)


def bits_of(table: SensitivityTable, name: str) -> int:
    """Bits per code of ``int6``, of a format, or of the checkpoint's own dtype (``keep``)."""
    if match := _BARE.fullmatch(name):
        return int(match[1])
    return Format.parse(table.formats[format_index(table, name)] if name == "keep" else name).bits

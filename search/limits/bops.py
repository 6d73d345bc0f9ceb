"""``--max-bops``: bit operations per token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...sensitivity.table import SensitivityTable
from ..problem import Constraint
from ._kinds import LIMITS, Limit, widths

if TYPE_CHECKING:
    from . import Limits

ACTIVATION_BITS = 16
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)")


class BitOperations(Limit):
    """The most bit operations of all units together."""

    def constraints(
        self, table: SensitivityTable, limits: Limits, allowed: NDArray[np.bool_]
    ) -> Iterator[Constraint]:
        """One, if there is a limit."""
        if limits.max_bops is not None:
            yield bit_operations(table, limits.max_bops)


def bit_operations(table: SensitivityTable, limit: float) -> Constraint:
    """BOPs per token: weights x bits per code x 16-bit activations, summed over the units.

    For a convolution it is per output position.  Every weight counts as used once, so routed
    experts and embeddings (which are looked up, not multiplied) count in full.

    Args:
        table: The sensitivity table.
        limit: The most BOPs.

    References:
        Wang et al. (2020), "Differentiable joint pruning and quantization" (BOPs).
    """
    bits = widths(table).astype(np.float64)
    weights = np.array([unit.weights for unit in table.units], dtype=np.float64)
    return Constraint(
        "BOPs", ACTIVATION_BITS * weights[:, None] * bits, float(limit), option="--max-bops"
    )


def parse_count(text: str) -> float:
    """Read a count such as ``12G``: k, M, G and T are powers of a thousand.

    >>> parse_count("1.5k")
    1500.0

    Raises:
        ValueError: If it is no positive count.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"Cannot read {text!r} as a count. Write a positive one such as 12G.")
    return float(match[1]) * _MULTIPLES[match[2]]


LIMITS.register("bops")(BitOperations())

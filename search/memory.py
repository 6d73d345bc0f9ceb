"""What weights take in the memory of a device, which is not what they take in a file."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..quantizers.format import Format
from ..sensitivity.table import SensitivityTable

Family = Literal["nvidia", "amd", "cpu"]


def resident_bytes(table: SensitivityTable, family: Family) -> NDArray[np.int64]:
    """Bytes of every unit in every format, ready to compute with: int64 [U, F].

    The kernels of a CPU read what is stored.  On a GPU matrices that are multiplied by are laid out
    in cells, with padding; embeddings that are only looked up and convolutions stay as they are
    stored.  A tied embedding is held twice: its rows are looked up in the stored form.  Parts of a
    matrix are padded each by itself, and take at most what is said here.

    Args:
        table: The sensitivity table.
        family: The family of the device.
    """
    formats = [Format.parse(name) for name in table.formats]
    parts: dict[str, list[tuple[int, int]]] = {}  # shapes of those of every matrix in parts
    for part in (part for unit in table.units for part in unit.parts if part.rows is not None):
        parts.setdefault(part.module, []).append(part.shape)
    types = table.provenance.layer_types
    size = table.bytes.copy()
    if family == "cpu":
        return size
    for u, unit in enumerate(table.units):
        kind = types.get(unit.name, "linear")
        if kind not in ("linear", "tied embedding"):
            continue
        for f, fmt in enumerate(formats):
            held = sum(
                _laid_out(fmt, part.shape, tuple(parts.get(part.module, ()))) for part in unit.parts
            )
            both = kind == "tied embedding" and fmt.layout == "codes"
            size[u, f] = held + (table.bytes[u, f] if both else 0)
    return size


@cache
def _laid_out(fmt: Format, shape: tuple[int, int], parts: tuple[tuple[int, int], ...]) -> int:
    from ..kernels import packing  # which loads torch

    return packing.resident_bytes(fmt, shape, parts=parts)

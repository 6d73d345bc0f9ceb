"""Budgets: how many bytes a plan may take, in the words a person uses."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

_EXAMPLES = "4.3bpw, 6GiB, 750MB, 123456B, 0.3x or file:82MB"
_PATTERN = re.compile(r"(file:)?\s*([+-]?\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_LEAST_BARE_BYTES = 1000  # a smaller number without a unit is bits or gigabytes, forgotten
_BYTES_IN = {"": 1} | _DECIMAL | _BINARY


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper bound on stored bytes, as written by the user.

    Attributes:
        text: The budget as it was written.
        kind: What ``value`` counts: ``bytes`` of the units, ``bpw`` (bits per weight), ``ratio``
            to the units' 16-bit size, or bytes of the whole written model ``file``.
        value: The exact number, so that ``4.3bpw`` never depends on binary rounding.
    """

    text: str
    kind: Literal["bytes", "bpw", "ratio", "file"]
    value: Fraction

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``4.3bpw``, ``6GiB``, ``750MB``, ``123456B``, ``123456``, ``0.3x``, ``file:82MB``.

        Raises:
            ValueError: If ``text`` is not a budget, or not a positive one.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"Cannot read the budget {text!r}. Write it as {_EXAMPLES}.")
        prefix, number, unit = match[1], match[2], match[3].lower()
        value = Fraction(number)
        if value <= 0:
            raise ValueError(f"The budget {text!r} must be positive. Write it as {_EXAMPLES}.")
        if not prefix and unit in ("bpw", "x"):
            return cls(text, "bpw" if unit == "bpw" else "ratio", value)
        if unit not in _BYTES_IN:
            what = "a file size" if prefix else "a budget"
            raise ValueError(
                f"{match[3]!r} in {text!r} is not a unit of {what}. Write it as {_EXAMPLES}."
            )
        if not unit and (value.denominator != 1 or value < _LEAST_BARE_BYTES):
            meant = f"'file:{number}MB'" if prefix else f"'{number}bpw' or '{number}GB'"
            raise ValueError(
                f"The budget {text!r} has no unit. Did you mean {meant}? Write it as {_EXAMPLES}."
            )
        return cls(text, "file" if prefix else "bytes", value * _BYTES_IN[unit])

    def resolve(self, weights: int, outside_bytes: int = 0) -> int:
        """The most bytes a plan for ``weights`` weights may take, rounded down.

        Args:
            weights: Number of weights in scope, tied weights counted once.
            outside_bytes: Bytes of the written file that are not units (norms, matrices out of
                scope, header); only a ``file:`` budget subtracts them.

        Raises:
            ValueError: If a ``file:`` budget leaves nothing for the units.
        """
        if self.kind == "bpw":
            return math.floor(self.value * weights / 8)
        if self.kind == "ratio":
            return math.floor(self.value * weights * 2)
        if self.kind == "bytes":
            return math.floor(self.value)
        left = math.floor(self.value) - outside_bytes
        if left <= 0:
            raise ValueError(
                f"The budget {self.text!r} leaves nothing for the weights: the rest of the file "
                f"takes {format_bytes(outside_bytes)} ({outside_bytes:,} B). Raise the budget or "
                "include more modules in the search."
            )
        return left


def format_bytes(count: int) -> str:
    """Bytes for people, in decimal units: ``950 B``, ``81.3 MB``.

    >>> format_bytes(81_300_000)
    '81.3 MB'
    """
    if count < 1000:
        return f"{count} B"
    size, unit = float(count), "B"
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007
        size /= 1000
        if round(size, 1) < 1000:
            break
    return f"{size:,.1f} {unit}"

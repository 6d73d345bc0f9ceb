"""Several calibration texts with weights: how they are written, and whose turn it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .names import BUILTIN, CHAT, CODE, LANGUAGES, MIXTURE, PROSE, SAMPLED, SELF, SHIPPED
from .text_files import is_text_file

_NAMES = {name: name for name in (*SHIPPED, *SAMPLED)} | {PROSE: BUILTIN}


@dataclass(frozen=True, slots=True)
class Share:
    """A text and its weight among others; only ratios of weights matter.

    Attributes:
        source: Name of a text, or the path of a file.
        weight: Positive.
    """

    source: str
    weight: float = 1.0

    @property
    def label(self) -> str:
        """The name, and of a path the last part."""
        return PROSE if self.source == BUILTIN else Path(self.source).name


DEFAULT_MIXTURE = (
    Share(BUILTIN, 0.4),
    Share(CODE, 0.2),
    Share(CHAT, 0.15),
    Share(LANGUAGES, 0.1),
    Share(SELF, 0.15),
)


def parse_shares(text: str) -> tuple[Share, ...]:
    """Read texts with weights, ``notes.txt:0.7,code:0.3``.

    Names are ``prose`` (or ``builtin``), ``code``, ``chat``, ``languages``, ``self`` and
    ``mixture``, which stands for the default; all else is a file.  Without weights all have the
    same.  The path of a file that is there wins over what its commas and colons could mean.

    Raises:
        ValueError: If a weight is not positive, or some have one and others none.

    >>> parse_shares("prose:3,code:1")
    (Share(source='builtin', weight=3.0), Share(source='code', weight=1.0))
    >>> parse_shares("mixture") == DEFAULT_MIXTURE
    True
    """
    if _is_text(text):
        return _whole(text, 1.0)
    items = [_weighted(item) for item in _items(text)]
    bare = [name for name, weight in items if weight is None]
    if bare and len(bare) < len(items):
        raise ValueError(
            f"{bare[0]!r} has no weight in {text!r}, and others have one. Give every text a weight "
            "(notes.txt:0.7,code:0.3), or none."
        )
    weights: dict[str, Fraction] = {}
    for name, weight in items:
        for share in _whole(name, 1.0 if weight is None else weight):
            weights[share.source] = weights.get(share.source, Fraction()) + _exact(share.weight)
    return tuple(Share(source, float(weight)) for source, weight in weights.items())


def turns(shares: Sequence[Share], count: int) -> list[int]:
    """Which text each of the first ``count`` sequences comes from.

    Of any first n sequences, every text has its exact share rounded up or down (Tijdeman 1980,
    "The chairman assignment problem", Algorithm 3.1), so what is drawn before and what is drawn
    after both have about the proportions.

    Args:
        shares: The texts.
        count: Sequences.

    Returns:
        Positions in ``shares``, one per sequence.

    >>> turns([Share("prose", 0.5), Share("code", 0.25), Share("chat", 0.25)], 8)
    [0, 1, 2, 0, 0, 1, 2, 0]
    """
    if len(shares) == 1:
        return [0] * count
    total = sum(_exact(share.weight) for share in shares)
    quota = [_exact(share.weight) / total for share in shares]
    slack = Fraction(1, 2 * len(shares) - 2)
    taken, order = [0] * len(shares), []
    for n in range(1, count + 1):
        due = [k for k, share in enumerate(quota) if share * n - taken[k] >= slack]
        first = min(due, key=lambda k: (taken[k] + 1 - slack) / quota[k])
        taken[first] += 1
        order.append(first)
    return order


def describe_shares(shares: Sequence[Share]) -> str:
    """Texts with their percentages, or the one text.

    >>> describe_shares(DEFAULT_MIXTURE[:2])
    'prose 66.7%, code 33.3%'
    """
    if len(shares) == 1:
        return Path(shares[0].source).name
    total = sum(share.weight for share in shares)
    return ", ".join(f"{share.label} {100 * share.weight / total:.3g}%" for share in shares)


def recorded_shares(calibration: Mapping[str, Any]) -> tuple[Share, ...]:
    """The texts that a plan or profile records, files by their names alone.

    >>> recorded_shares({"source": "builtin", "sequences": 96})
    (Share(source='builtin', weight=1.0),)
    """
    if texts := calibration.get("texts"):
        return tuple(Share(str(text["source"]), float(text["weight"])) for text in texts)
    return (Share(str(calibration.get("source", BUILTIN))),)


def _whole(name: str, weight: float) -> tuple[Share, ...]:
    """One text, or those of the default mixture at the same ratios."""
    if name != MIXTURE:
        return (Share(_NAMES.get(name, str(Path(name))), weight),)  # ./a.txt is a.txt
    total = sum(_exact(share.weight) for share in DEFAULT_MIXTURE)
    scale = _exact(weight) / total
    return tuple(
        Share(share.source, float(_exact(share.weight) * scale)) for share in DEFAULT_MIXTURE
    )


def _is_text(name: str) -> bool:
    return name in _NAMES or name == MIXTURE or is_text_file(name)


def _items(text: str) -> list[str]:
    """Cut at commas, but not inside the path of a file that is there."""
    pieces, items = text.split(","), []
    while pieces:
        for end in range(len(pieces), 0, -1):
            item = ",".join(pieces[:end])
            if end == 1 or _is_text(_split(item)[0]):
                break
        items.append(item)
        pieces = pieces[end:]
    return items


def _weighted(item: str) -> tuple[str, float | None]:
    """A text and its weight, if it has one."""
    name, number = _split(item)
    if number is None:
        return name, None
    weight = float(number)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"The weight of {name!r} is {number}; weights are positive numbers.")
    return name, weight


def _split(item: str) -> tuple[str, str | None]:
    """A text and what stands after its last colon, if that is a number."""
    name, _, number = item.rpartition(":")
    if _is_text(item) or not name:
        return item, None
    try:
        float(number)
    except ValueError:
        return item, None
    return name, number


def _exact(weight: float) -> Fraction:
    """The decimal number that was written, so that the order of turns is that of a record's."""
    return Fraction(repr(weight))

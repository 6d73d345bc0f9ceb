"""What a mistyped name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """`` Did you mean 'x'?`` with a space before it, or nothing if no known name is near.

    Args:
        name: What was asked for.
        known: The names there are.
        count: The most names to propose.
        cutoff: Least similarity, from 0 to 1.

    >>> did_you_mean("gredy", ["greedy", "dp"])
    " Did you mean 'greedy'?"
    >>> did_you_mean("x", ["greedy", "dp"])
    ''
    """
    return propose(closest(name, known, count, cutoff))


def closest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known names nearest to ``name``, best first; none if none is near."""
    return get_close_matches(name, list(known), n=count, cutoff=cutoff)


def propose(close: Sequence[str]) -> str:
    """`` Did you mean 'a' or 'b'?``, or nothing without a name.

    >>> propose(["a", "b"])
    " Did you mean 'a' or 'b'?"
    """
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""

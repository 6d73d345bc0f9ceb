"""The memory of this process: giving back to the system what nothing uses any more."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Hand freed memory back to the system, where the C library can (glibc).

    A pass over a batch frees what it took in pieces of all sizes, with others in between that live
    on; glibc keeps the gaps, and the next batch, whose pieces come in another order, takes new
    memory beside them.  Called between batches, the peak is that of one batch.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
    return found

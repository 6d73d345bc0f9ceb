"""The memory of this process: giving back to the system what nothing uses any more."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Condition

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Room:
    """Memory that threads take turns in: who finds no room waits, and who alone needs more goes.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._taken, self._changed = limit, 0, Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Wait until there are ``size`` bytes, or nobody else has any, and have them inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self.limit)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


def memory_of_machine() -> int:
    """Bytes of main memory that processes here may have together."""
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in map(Path, _CGROUPS):
        text = path.read_text().strip() if path.is_file() else ""
        found = min(found, int(text)) if text.isdigit() else found
    return found


def available_memory() -> int:
    """Bytes that could be taken without pushing anything out: free, or filled with copies of files.

    What the machine has, where it does not say.
    """
    found = memory_of_machine()
    with suppress(OSError, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
        found = min(found, 1024 * int(line.split()[1]))
    return found


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

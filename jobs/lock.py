"""One process at a time in a run folder."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from .._base.progress import clock
from .folder import RunFolder
from .record import age, now

LOCK_TRIES = 5  # `is_running` holds a lock for an instant, which must not stop a run
LOCK_PAUSE = 0.05  # seconds between two tries


class RunLock:
    """Keeps a run folder to one process; the operating system frees it when that process ends.

    The lock is advisory, on ``job.lock``, which stays there and says who holds it or held it
    last.

    Args:
        folder: The run folder; made if it is not there.
        command: What the process does, for the message to others.

    Raises:
        ValueError: On entering, if another process holds it: which, since when, doing what.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self._folder = folder
        self._command = command

    def __enter__(self) -> RunLock:
        """Take the lock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = RunFolder(self._folder).lock
        self._file = path.open("a+b", buffering=0)
        for left in reversed(range(LOCK_TRIES)):
            if _try_lock(self._file.fileno(), shared=False):
                break
            if not left:
                self._file.close()
                raise ValueError(self._refusal(path))
            time.sleep(LOCK_PAUSE)
        holder = {"pid": os.getpid(), "since": now(), "command": self._command}
        self._file.truncate(0)
        self._file.write((json.dumps(holder) + "\n").encode())
        return self

    def __exit__(self, *_: object) -> None:
        """Free the lock."""
        self._file.close()

    def _refusal(self, path: Path) -> str:
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
            who = f"process {holder['pid']}, which has run `{holder['command']}` there since "
            who += f"{holder['since']} ({clock(age(holder['since']))})"
            stop = f"stop it with `kill {holder['pid']}`"
        except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or was damaged
            who, stop = "another process", "stop it"
        return (
            f"{self._folder} is in use by {who}. Wait until it is done, {stop}, or choose another "
            "--out. `bitplan jobs` shows how far it is."
        )


def is_running(folder: Path) -> bool:
    """Whether a process holds the run folder's lock."""
    try:
        with RunFolder(folder).lock.open("rb") as file:
            return not _try_lock(file.fileno(), shared=True)
    except OSError:
        return False


if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 30  # far behind the content, which others may then read

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

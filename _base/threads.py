"""Worker threads that run many small tensor operations side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(work: Callable[[T], R], items: Iterable[T], device: torch.device) -> Iterator[R]:
    """``map`` over as many threads as torch uses, each running torch on one core; in order.

    Work made of operations too small to be split well by torch itself gets all cores this way,
    without a synchronization after each operation. On any other device than the CPU a plain
    ``map``.
    """
    if device.type != "cpu":
        return map(work, items)
    return _pool(torch.get_num_threads()).map(work, items)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(count, "bitplan")
    together = threading.Barrier(count)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # fixes the number for this thread
        together.wait()

    for started in [pool.submit(start) for _ in range(count)]:
        started.result()
    torch.set_num_threads(count)  # what other threads start with
    return pool

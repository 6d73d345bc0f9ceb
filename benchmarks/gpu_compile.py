"""Compiling many kernels at once, for a processor that need not be here.

Every process launches its share of the products on tensors in main memory, with a driver that only
names the processor: Triton compiles what a launch needs, keeps it on disk, and nothing runs.  On
the device the launches find their kernels there.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bitplan.benchmarks.gpu_cases import Case, compiled_by, launches

SHARED_BYTES = 227 << 10  # that a program may have on a Hopper


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came of one product.

    Attributes:
        name: The case.
        seconds: Compiling and all else.
        shared_bytes: The most shared memory of its kernels.
        error: What went wrong, or empty.
    """

    name: str
    seconds: float
    shared_bytes: int
    error: str


def compile_all(
    cases: Sequence[Case],
    capability: int,
    processors: int,
    workers: int,
    left: Callable[[], float],
) -> Iterator[Compiled]:
    """Compile the kernels of some products, as they get ready.

    Args:
        cases: The products; those that need the same kernels are compiled once.
        capability: Of the processor, 90 for a Hopper.
        processors: Multiprocessors, by which launches are chosen.
        workers: Processes.
        left: Seconds until no further product is begun.
    """
    distinct = list({compiled_by(case): case for case in cases}.values())
    distinct.sort(key=lambda case: -len(case.weight.specs))  # those that take longest come first
    with _compiling():
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start, (capability,)
        )
        try:
            futures = [pool.submit(_compile, case, processors) for case in distinct]
            for future in as_completed(futures, timeout=max(1.0, left())):
                yield future.result()
        except TimeoutError:
            yield Compiled("out of time", 0.0, 0, "")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _compiling() -> Iterator[None]:
    """Processes that are started compile, also where this one interprets."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


_SHARED: list[int] = []


def _start(capability: int) -> None:
    """Make this process one that compiles and never runs a kernel."""
    import torch
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    torch.set_num_threads(1)
    driver.set_active(_Elsewhere(capability))
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        _SHARED.append(kernel.metadata.shared)
        return kernel

    JITFunction.run = only_compile


class _Elsewhere:
    """A driver of Triton's for a processor that is not used."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def _compile(case: Case, processors: int) -> Compiled:
    import torch

    start, error = time.perf_counter(), ""
    _SHARED.clear()
    try:
        launches(case, torch.device("cpu"), processors)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"[-2000:]
    shared = max(_SHARED, default=0)
    if shared > SHARED_BYTES:
        error = f"needs {shared} bytes of shared memory"
    return Compiled(case.name, time.perf_counter() - start, shared, error)

"""Rendering errors of all formats, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._base.threads import parallel_map
from ..models.rendering import Renderer
from ..quantizers.format import Format
from ..quantizers.store import Rows

T = TypeVar("T")


def map_errors(
    work: Callable[[Rows, Tensor], T],
    renderer: Renderer,
    name: str,
    formats: Sequence[Format],
    rows: Tensor | None = None,
    chunk: int | None = None,
) -> Iterator[T]:
    """Apply ``work`` to the rendering errors of all formats, a block of rows at a time.

    Blocks are worked on side by side; whatever the size of the matrix, only one block of errors
    per format and thread exists at a time.

    Args:
        work: Maps the rows of a block, a slice or a part of ``rows``, and their errors
            ``rendering - W`` [F, rows, cols] to a result.
        renderer: Source of the renderings.
        name: Canonical module name.
        formats: The F formats.
        rows: Indices of the rows to go through; None for all.
        chunk: Weights per block and format; by default few enough for the cache of a core on a
            CPU, and enough to occupy any other device.

    Yields:
        The results, in the order of the rows.
    """
    weight = renderer.weight(name)
    count, cols = len(weight) if rows is None else len(rows), weight.shape[1]
    on_cpu = weight.device.type == "cpu"
    blocks = math.ceil(count * cols / (chunk or (1 << 17 if on_cpu else 1 << 23)))
    if on_cpu:
        blocks += blocks % 2  # small matrices have few, which are to keep two cores busy
    step = math.ceil(count / max(1, blocks)) or 1
    for fmt in formats:
        renderer.prepare(name, fmt)  # fitted here, once, rather than by several workers

    def run(start: int) -> T:
        block = slice(start, min(start + step, count))
        some = block if rows is None else rows[block]
        errors = torch.empty(len(formats), block.stop - start, cols, device=weight.device)
        for i, fmt in enumerate(formats):
            renderer.render(name, fmt, some, out=errors[i]).sub_(weight[some])
        return work(some, errors)

    starts = range(0, count, step)
    yield from parallel_map(run, starts, weight.device)


def squared_errors(
    renderer: Renderer, name: str, formats: Sequence[Format], rows: Tensor | None = None
) -> NDArray[np.float64]:
    """``||dW_f||^2`` of one matrix, or some of its rows, in every format: float64 [F]."""

    def work(_rows: Rows, errors: Tensor) -> NDArray[np.float64]:
        total: NDArray[np.float64] = (
            errors.flatten(1).square_().sum(1, dtype=torch.float64).cpu().numpy()
        )
        return total

    return sum(map_errors(work, renderer, name, formats, rows), np.zeros(len(formats)))

"""Packed layers on a CPU: codes are unpacked in registers, right where they are multiplied.

The kernels of ``cpu.cpp`` read the tensors as they are stored, so nothing is laid out anew, and
compute in float32 whatever the dtype of the activations.  One library has all widths and shapes.
"""

from __future__ import annotations

import ctypes
import math
import time
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..quantizers.format import Format
from ..quantizers.packed import PackedTensor
from . import native
from .native import NativeWeight

FEW = 32  # rows of activations up to which the fused kernel beats unpacking a tile for BLAS
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FLOATS = {"bf16": 16, "fp16": 17}  # formats of plain weights, as cpu.cpp numbers them
_TABLE = 18  # likewise for 4-bit codes that index a table
_WHOLE_ROW = 62  # log2 of more columns than there are
_TRIAL = (1024, 1024)  # shape of the comparison with float32
_ROUNDS = 12
_TILE = 1 << 19  # weights that are dequantized at a time
_ONE_THREAD = 1 << 18  # products that one thread does before another would have woken up


class CpuWeight:
    """A packed weight [rows, cols] on a CPU, as the kernels see it: pointers to its stored parts.

    Args:
        packed: The weight, in a format that :func:`takes` says.  Its tensors are kept, not copied.

    Raises:
        RuntimeError: If there are no compiled kernels.
    """

    def __init__(self, packed: PackedTensor) -> None:
        library = native.library()
        if library is None:
            raise RuntimeError("There are no compiled kernels.")
        self.fmt, self.shape = packed.fmt, packed.shape
        # Their addresses must stay valid as long as this object.
        self.parts = {name: part.contiguous() for name, part in packed.tensors.items()}
        self._codes = self.parts["weight" if packed.fmt.floating else "codes"]
        self._levels = torch.tensor(packed.fmt.levels or (), dtype=torch.float32, device="cpu")
        self._linear, self._unpack = library.bitplan_linear, library.bitplan_unpack
        self._small = math.prod(packed.shape) < _ONE_THREAD
        self._point()

    def _point(self) -> None:
        """Take the addresses of the parts."""
        fmt, (rows, cols) = self.fmt, self.shape
        zero, scale = self.parts.get("zero"), self.parts.get("scale")
        self._address = self._codes.data_ptr()
        self.native = NativeWeight(
            codes=self._address,
            scale=None if scale is None else scale.data_ptr(),
            zero=None if zero is None else zero.data_ptr(),
            rows=rows,
            cols=cols,
            row_bytes=self._codes.shape[1] * self._codes.itemsize,  # one row may have any stride
            groups=fmt.groups(cols),
            log_group=int(math.log2(fmt.group_size)) if fmt.group_size > 0 else _WHOLE_ROW,
            bits=_FLOATS.get(fmt.name, _TABLE if fmt.levels else fmt.bits),
            per_tensor=int(scale is not None and scale.numel() == 1),
            levels=self._levels.data_ptr(),
        )
        self._pointer = ctypes.addressof(self.native)

    def linear(self, x: Tensor, bias: Tensor | None, threads: int | None = None) -> Tensor:
        """``x @ W.T + bias``: x [..., cols] to [..., rows], in the dtype of x.

        Up to ``FEW`` rows of x are multiplied by weights that exist in registers only.  For more,
        tiles of a few megabytes are dequantized and multiplied by BLAS, in float32 too.

        Args:
            x: Inputs [..., cols].
            bias: [rows] or None.
            threads: How many compute up to ``FEW`` rows; by default as many as pay.

        Raises:
            ValueError: If x or bias has another shape, or is not on the CPU.
        """
        shape, (rows, cols) = x.shape, self.shape
        if not shape or shape[-1] != cols or not x.is_cpu:
            raise ValueError(
                f"A weight [{rows}, {cols}] on the CPU multiplies inputs [..., {cols}] on the CPU, "
                f"but was given {list(shape)} on {x.device}."
            )
        count = x.numel() // cols
        kind = _TYPES.get(x.dtype)
        if bias is not None:
            bias = _checked_bias(bias, rows)
        if count > FEW or kind is None:
            return self._by_tiles(x, bias)
        if not x.is_contiguous():
            x = x.contiguous()
        if self._codes.data_ptr() != self._address:  # they went to shared memory, for example
            self._point()
        if threads is None:
            threads = 1 if self._small and count == 1 else torch.get_num_threads()
        address = None if bias is None else bias.data_ptr()
        y = x.new_empty((*shape[:-1], rows))
        self._linear(self._pointer, x.data_ptr(), kind, count, address, y.data_ptr(), threads)
        return y

    def unpack(self, indices: Tensor | None = None) -> Tensor:
        """Rows of W as float32: all, or those with the indices [n]."""
        rows, cols = self.shape
        count, address = rows, None
        if indices is not None:
            indices = _checked(indices, rows)
            count, address = indices.numel(), indices.data_ptr()
        out = _floats(count, cols)
        self._fill(out, address, 0)
        return out

    def _fill(self, out: Tensor, indices: int | None, first: int) -> None:
        threads = 1 if out.numel() < _ONE_THREAD else torch.get_num_threads()
        if self._codes.data_ptr() != self._address:
            self._point()
        self._unpack(self._pointer, indices, first, len(out), out.data_ptr(), threads)

    def _by_tiles(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, cols = self.shape
        flat = x.reshape(-1, cols).float()
        y = _floats(flat.shape[0], rows)
        step = max(1, _TILE // cols)
        tile = _floats(min(step, rows), cols)
        for first in range(0, rows, step):
            part = tile[: rows - first]
            self._fill(part, None, first)
            torch.mm(flat, part.T, out=y[:, first : first + step])
        if bias is not None:
            y += bias
        return y.to(x.dtype).view(*x.shape[:-1], rows)


def _floats(rows: int, cols: int) -> Tensor:
    """Memory for float32 [rows, cols], whatever torch's defaults of dtype and device are."""
    return torch.empty((rows, cols), dtype=torch.float32, device="cpu")


def _checked_bias(bias: Tensor, rows: int) -> Tensor:
    """A bias as contiguous float32.

    Raises:
        ValueError: If it is not [rows] or not on the CPU.
    """
    if bias.shape != (rows,) or not bias.is_cpu:
        raise ValueError(
            f"The bias must be [{rows}] on the CPU, but is {list(bias.shape)} on {bias.device}."
        )
    return bias.float().contiguous()


def _checked(indices: Tensor, rows: int) -> Tensor:
    """Row numbers as contiguous int64.

    Raises:
        IndexError: If one is not within a weight of ``rows`` rows.
    """
    indices = indices.to("cpu", torch.int64).contiguous()
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < rows:
        raise IndexError(
            f"Rows {int(indices.min())} to {int(indices.max())} were looked up in a weight that "
            f"has rows 0 to {rows - 1}."
        )
    return indices


def takes(fmt: Format) -> bool:
    """Whether the kernels read a format: integers, 4-bit codes of levels, bf16 and fp16."""
    if fmt.levels is not None:
        return fmt.layout == "codes" and fmt.bits == 4 and not fmt.rank
    return fmt.integer or fmt.name in _FLOATS


@cache
def faster(fmt: Format) -> bool:
    """Whether the kernel beats ``matmul`` with a float32 weight at one row of activations.

    Measured once for every format on a weight of ``_TRIAL``, which no cache of a core holds in
    float32; layers so small that the call itself takes the time are no reason to unpack them.  The
    kernel may also win on one thread: where other programs keep the cores busy, threads that wait
    for each other say more about these than about the kernel.
    """
    fused, plain = _times(fmt)
    if fused > plain:
        warnings.warn(
            f"The kernel for {fmt} weights is slower than plain float32 on this CPU "
            f"({1e6 * fused:.0f} and {1e6 * plain:.0f} us for {_TRIAL[0]} x {_TRIAL[1]}), so such "
            "layers are kept dequantized in memory.",
            stacklevel=3,
        )
    return fused <= plain


def _times(fmt: Format) -> tuple[float, float]:
    """Seconds for one row of activations times a weight of ``_TRIAL``: fused, and float32."""
    parts = {
        name: torch.ones(shape, dtype=getattr(torch, dtype), device="cpu")
        for name, (shape, dtype) in fmt.tensors(_TRIAL).items()
    }
    weight = CpuWeight(PackedTensor(fmt, _TRIAL, parts))
    dense, x = weight.unpack(), _floats(1, _TRIAL[1]).fill_(1)
    calls: list[Callable[[], Tensor]] = [
        lambda: weight.linear(x, None),
        lambda: weight.linear(x, None, 1),
        lambda: linear(x, dense),
    ]
    best = [math.inf] * len(calls)
    for _ in range(_ROUNDS):  # in turns, and the least of each: other programs disturb both
        for i, call in enumerate(calls):
            started = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - started)
    return min(best[:2]), best[2]

"""Packed tensors: a weight as the exact bytes that are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .format import Fitted, Format, family_of
from .lines import Grid

_SPREAD = {1: torch.int64, 2: torch.int32, 4: torch.int16}  # as many bytes as a byte has codes


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """A weight [rows, cols] in one format, stored without a wasted byte.

    Attributes:
        fmt: The format.
        shape: (rows, cols) of the weight.
        tensors: The stored parts, exactly those of ``fmt.tensors(shape)``.

    Raises:
        ValueError: If a part is missing, unknown, or has the wrong shape or dtype.
    """

    fmt: Format
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        expected = self.fmt.tensors(self.shape)
        if self.tensors.keys() != expected.keys():
            raise ValueError(
                f"A {self.fmt} weight {list(self.shape)} consists of {', '.join(expected)}, "
                f"but {', '.join(self.tensors) or 'nothing'} was given."
            )
        for name, (shape, dtype) in expected.items():
            part = self.tensors[name]
            found = str(part.dtype).removeprefix("torch.")
            if tuple(part.shape) != shape or found != dtype:
                raise ValueError(
                    f"{name!r} of a {self.fmt} weight {list(self.shape)} must be "
                    f"{dtype} {list(shape)}, but is {found} {list(part.shape)}."
                )

    @staticmethod
    def pack(weight: Tensor, fmt: Format, grid: Fitted | None) -> PackedTensor:
        """Store ``weight`` [rows, cols], rounded to ``grid``: what its family keeps of it."""
        rows, cols = weight.shape
        return PackedTensor(fmt, (rows, cols), family_of(fmt).pack(weight, fmt, grid))

    @staticmethod
    def of_codes(codes: Tensor, fmt: Format, grid: Grid) -> PackedTensor:
        """Store given codes, uint8 [rows, cols], of a grid.

        Raises:
            ValueError: If the format is not one of codes alone.
        """
        rows, cols = codes.shape
        return PackedTensor(fmt, (rows, cols), family_of(fmt).store(codes, fmt, grid))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parts; equal to ``fmt.stored_bytes(shape)``."""
        return sum(part.nbytes for part in self.tensors.values())

    def grid(self) -> Grid | None:
        """The scales and zero points of the codes; None for a float format."""
        return family_of(self.fmt).grid(self.fmt, self.tensors)

    def fitted(self) -> Fitted | None:
        """What ``render`` takes: the grid, or whatever else the family keeps of a weight."""
        return family_of(self.fmt).fitted(self.fmt, self.tensors)

    def coded(self) -> PackedTensor:
        """The weight of the codes alone, without what the format adds to what they stand for."""
        base = self.fmt.base
        if base is None:
            return self
        parts = {name: self.tensors[name] for name in base.tensors(self.shape)}
        return PackedTensor(base, self.shape, parts)

    def to(self, device: torch.device) -> PackedTensor:
        """The same on a device; itself if it is there."""
        if all(part.device == device for part in self.tensors.values()):
            return self
        parts = {name: part.to(device) for name, part in self.tensors.items()}
        return PackedTensor(self.fmt, self.shape, parts)

    def dequantize(
        self, rows: slice | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The weight [rows, cols], or some of its rows, as a plain tensor of ``dtype``."""
        some = slice(None) if rows is None else rows
        return family_of(self.fmt).decode(self.fmt, self.shape[1], self.tensors, some).to(dtype)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack b-bit codes LSB-first: code i of a row fills the bits i*b ... i*b + b - 1 of that row.

    Args:
        codes: Codes below 2^b [rows, count], uint8.
        bits: b, from 1 to 8.

    Returns:
        Bytes [rows, ceil(count * b / 8)], uint8; unused bits of the last byte are 0.
    """
    if bits == 8:
        return codes.contiguous()
    rows, count = codes.shape
    padded = pad(codes, (0, -count % 8)).contiguous().view(-1)  # flat: a stride of one row is any
    words = padded.view(torch.int64).view(rows, -1)  # eight codes in a word
    for lane in (8, 16, 32):  # close the gap between the two neighbours in every pair of lanes
        used = lane * bits // 8
        low = _repeat(2**used - 1, 2 * lane)
        words = (words & low) | ((words >> (lane - used)) & (low << used))
    stream = words.view(torch.uint8).view(rows, -1, 8)[..., :bits].reshape(rows, -1)
    return stream[:, : math.ceil(count * bits / 8)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Invert ``pack_bits``: bytes [rows, ceil(count * b / 8)] to codes [rows, count], uint8."""
    if bits == 8:
        return packed
    if bits in _SPREAD:  # a byte holds 8/b whole codes: spread it over as many bytes
        wide = packed.to(_SPREAD[bits])
        codes = wide.clone()
        for i in range(1, 8 // bits):
            codes |= wide << ((8 - bits) * i)
        codes &= sum((2**bits - 1) << (8 * i) for i in range(8 // bits))
        return codes.view(torch.uint8)[:, :count]
    rows, size = packed.shape
    stream = pad(packed, (0, -size % bits)).view(rows, -1, bits)  # b bytes hold eight codes
    words = pad(stream, (0, 8 - bits)).view(torch.int64)
    for lane in (32, 16, 8):  # the steps of pack_bits, backwards
        used = lane * bits // 8
        low = _repeat(2**used - 1, 2 * lane)
        words = (words & low) | ((words << (lane - used)) & (low << lane))
    return words.view(torch.uint8).view(rows, -1)[:, :count]


def bits_at(stream: Tensor, bits: int, places: Tensor) -> Tensor:
    """Some codes of an LSB-first stream.

    Args:
        stream: Bytes [n], uint8.
        bits: Bits of a code, from 1 to 8.
        places: Numbers of the codes, int64 of any shape.

    Returns:
        The codes, uint8, shaped like ``places``.
    """
    first = places * bits
    low, shift = first >> 3, first & 7
    word = stream[low].int() | (stream[(low + 1).clamp_(max=len(stream) - 1)].int() << 8)
    codes: Tensor = (word >> shift) & (2**bits - 1)
    return codes.to(torch.uint8)


def _repeat(mask: int, step: int) -> int:
    """A 64-bit mask that repeats ``mask`` every ``step`` bits."""
    return sum(mask << shift for shift in range(0, 64, step))

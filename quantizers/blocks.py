"""Block formats of llama.cpp: the bytes of a block, and what its fields mean.

A block holds 32 or 256 weights of one row with their codes and scales interleaved. Every layout is
described once, as the order of its fields; packing and unpacking follow from that.

References:
    The structures ``block_q4_1`` ... ``block_iq4_xs`` of ggml (MIT), ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .block_sizes import BLOCKS
from .format import Format
from .lines import Grid, Line, exponent

# The 16 levels of IQ4_NL, finer near zero; and of FP4 (E2M1), in halves of its smallest step.
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Codes(NamedTuple):
    """Some bits of every code: ``width`` bits from ``shift`` on.

    A byte holds those of 8/width codes, ``chunk * width / 8`` apart, the first one lowest.
    """

    shift: int
    width: int
    chunk: int


class Scales(NamedTuple):
    """Scales (and minimums) of the groups of a block, in a packing of their own."""

    nbytes: int
    pack: Callable[[Tensor, Tensor | None], Tensor]
    unpack: Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of a block in order, and how they give weights.

    With a code c, a scale d of the block and a scale u of the group, the weight is
    ``d (u - bias) (c - zero)``, or ``d (u - bias) levels[c]``, less ``m`` times the group's
    minimum, or plus ``m`` if there are no minimums. Without group scales ``u - bias`` is 1.

    Attributes:
        fields: ``"d"`` and ``"m"`` are float16, ``"e"`` is d as an exponent in a byte.
        zero: The implicit zero point of the codes.
        levels: What a code stands for, instead of itself.
        scale_range: Smallest and largest ``u - bias``.
        bias: What is added to a group's scale before it is stored.
    """

    fields: tuple[str | Codes | Scales, ...]
    zero: int = 0
    levels: tuple[int, ...] | None = None
    scale_range: tuple[int, int] | None = None
    bias: int = 0
    flip: int = 0  # bits of a code that are stored inverted


def pack_blocks(
    name: str,
    codes: Tensor,
    d: Tensor,
    m: Tensor | None,
    scales: Tensor | None = None,
    mins: Tensor | None = None,
) -> Tensor:
    """Pack codes and scales into blocks.

    Args:
        name: A layout's name, such as ``q4_k``.
        codes: uint8 [rows, blocks * block size].
        d: float16 [rows, blocks], or uint8 exponents.
        m: float16 [rows, blocks] for layouts that have it.
        scales: uint8 [rows, groups], biased, for layouts that have them.
        mins: uint8 [rows, groups], likewise.

    Returns:
        Bytes uint8 [rows, blocks * bytes of a block].
    """
    layout, block = layouts()[name], BLOCKS[name].block_size
    rows = codes.shape[0]
    flat = codes.reshape(-1, block) ^ layout.flip
    count = len(flat)
    parts = []
    for field in layout.fields:
        if isinstance(field, Codes):
            parts.append(_pack_codes(flat, field))
        elif isinstance(field, Scales):
            assert scales is not None
            grouped = None if mins is None else mins.reshape(count, -1)
            parts.append(field.pack(scales.reshape(count, -1), grouped))
        else:
            value = m if field == "m" else d
            assert value is not None
            parts.append(value.contiguous().view(torch.uint8).reshape(count, -1))
    return torch.cat(parts, 1).view(rows, -1)


def unpack_blocks(
    name: str, blocks: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Invert :func:`pack_blocks`: codes, d, m, scales, mins from bytes [rows, ...]."""
    layout, kind = layouts()[name], BLOCKS[name]
    rows = blocks.shape[0]
    flat = blocks.reshape(-1, kind.nbytes)
    codes = torch.zeros(len(flat), kind.block_size, dtype=torch.uint8, device=blocks.device)
    found: dict[str, Tensor | None] = {"d": None, "m": None, "scales": None, "mins": None}
    for field, place in _places(layout, kind.block_size):
        if isinstance(field, Codes):
            codes |= _unpack_codes(flat[:, place], field)
        elif isinstance(field, Scales):
            scales, mins = field.unpack(flat[:, place])
            found["scales"] = scales.reshape(rows, -1)
            found["mins"] = None if mins is None else mins.reshape(rows, -1)
        elif field == "e":
            found["d"] = flat[:, place].reshape(rows, -1)
        else:
            found[field] = flat[:, place].contiguous().view(torch.float16).reshape(rows, -1)
    assert found["d"] is not None
    codes ^= layout.flip
    return codes.view(rows, -1), found["d"], found["m"], found["scales"], found["mins"]


def with_scales(name: str, blocks: Tensor, d: Tensor, m: Tensor | None) -> Tensor:
    """The same blocks with other scales of theirs.

    Args:
        name: A layout's name.
        blocks: Bytes uint8 [rows, ...].
        d: float16 [rows, blocks], or uint8 exponents.
        m: float16 [rows, blocks] for layouts that have it.
    """
    layout, kind = layouts()[name], BLOCKS[name]
    flat = blocks.clone().reshape(-1, kind.nbytes)
    for field, place in _places(layout, kind.block_size):
        if isinstance(field, str):
            value = m if field == "m" else d
            assert value is not None
            flat[:, place] = value.contiguous().view(torch.uint8).reshape(len(flat), -1)
    return flat.view(blocks.shape)


def block_line(fmt: Format, grid: Grid) -> Line:
    """What the codes of every group [rows, groups] stand for, from the fields of its block."""
    layout = layouts()[fmt.name]
    scale = exponent(grid.scale) if grid.scale.dtype == torch.uint8 else grid.scale.float()
    offset = None if grid.zero is None else grid.zero.float()
    per_block = fmt.block_size // fmt.group_size
    if grid.scales is not None:
        scale = scale.repeat_interleave(per_block, 1) * (grid.scales.float() - layout.bias)
    if grid.mins is not None and offset is not None:
        offset = -(offset.repeat_interleave(per_block, 1) * grid.mins.float())
    levels = None
    if layout.levels is not None:
        levels = torch.tensor(layout.levels, dtype=torch.float32, device=scale.device)
    return Line(scale, torch.tensor(float(layout.zero)), offset, levels, whole=True)


def _places(layout: Layout, block_size: int) -> Iterator[tuple[str | Codes | Scales, slice]]:
    """Every field with its bytes in a block."""
    start = 0
    for field in layout.fields:
        if isinstance(field, Codes):
            size = block_size * field.width // 8
        elif isinstance(field, Scales):
            size = field.nbytes
        else:
            size = 1 if field == "e" else 2
        yield field, slice(start, start + size)
        start += size


def _pack_codes(codes: Tensor, field: Codes) -> Tensor:
    """uint8 [count, block size] -> bytes [count, block size * width / 8]."""
    mask = 2**field.width - 1
    lanes = 8 // field.width
    parts = ((codes >> field.shift) & mask).view(len(codes), -1, lanes, field.chunk // lanes)
    packed: Tensor = parts[:, :, 0].clone()
    for lane in range(1, lanes):
        packed |= parts[:, :, lane] << (lane * field.width)
    return packed.reshape(len(codes), -1)


def _unpack_codes(packed: Tensor, field: Codes) -> Tensor:
    mask = 2**field.width - 1
    lanes = 8 // field.width
    parts = packed.reshape(len(packed), -1, 1, field.chunk // lanes)
    shifts = torch.arange(0, 8, field.width, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (parts >> shifts.view(1, 1, lanes, 1)) & mask
    return codes.reshape(len(packed), -1) << field.shift


def _pack_nibbles(scales: Tensor, mins: Tensor | None) -> Tensor:
    """Q2_K: scale low, minimum high."""
    assert mins is not None
    return scales | (mins << 4)


def _unpack_nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    return packed & 15, packed >> 4


def _pack_six(scales: Tensor, mins: Tensor | None) -> Tensor:
    """Q4_K, Q5_K: eight 6-bit scales and minimums in 12 bytes.

    The first four of each take six bits of a byte of their own; the other four have their low
    four bits in the last four bytes, and their high two bits on top of the first ones.
    """
    assert mins is not None
    first = [part[:, :4] | ((part[:, 4:] >> 4) << 6) for part in (scales, mins)]
    return torch.cat([*first, (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)], 1)


def _unpack_six(packed: Tensor) -> tuple[Tensor, Tensor]:
    low = packed[:, 8:]
    scales, mins = (
        torch.cat([part & 63, ((low >> shift) & 15) | ((part >> 6) << 4)], 1)
        for part, shift in ((packed[:, :4], 0), (packed[:, 4:8], 4))
    )
    return scales, mins


def _pack_signed_six(scales: Tensor, _mins: Tensor | None) -> Tensor:
    """Q3_K: sixteen 6-bit scales, four low bits first, two high bits of four in a byte."""
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    return torch.cat([low, _pack_codes(scales, Codes(4, 2, 16))], 1)


def _unpack_signed_six(packed: Tensor) -> tuple[Tensor, None]:
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    return low | _unpack_codes(packed[:, 8:], Codes(4, 2, 16)), None


def _pack_eights(scales: Tensor, _mins: Tensor | None) -> Tensor:
    """IQ4_XS: eight 6-bit scales; high two bits in order first, then low four in order."""
    return torch.cat([_pack_codes(scales, Codes(4, 2, 4)), _pack_codes(scales, Codes(0, 4, 2))], 1)


def _unpack_eights(packed: Tensor) -> tuple[Tensor, None]:
    high, low = packed[:, :2], packed[:, 2:]
    return _unpack_codes(high, Codes(4, 2, 4)) | _unpack_codes(low, Codes(0, 4, 2)), None


def _pack_bytes(scales: Tensor, _mins: Tensor | None) -> Tensor:
    """Q6_K: signed bytes."""
    return scales ^ 128


def _unpack_bytes(packed: Tensor) -> tuple[Tensor, None]:
    return packed ^ 128, None


@cache
def layouts() -> dict[str, Layout]:
    """The layouts by name; ``q4_0``, ``q5_0`` and ``q8_0`` are integer formats of ours too."""
    nibbles, fifth, pairs = Codes(0, 4, 32), Codes(4, 1, 8), Codes(0, 2, 128)
    six = Scales(12, _pack_six, _unpack_six)
    return {
        "q4_0": Layout(("d", nibbles), zero=8),
        "q4_1": Layout(("d", "m", nibbles)),
        "q5_0": Layout(("d", fifth, nibbles), zero=16),
        "q5_1": Layout(("d", "m", fifth, nibbles)),
        "q8_0": Layout(("d", Codes(0, 8, 8)), zero=128, flip=128),
        "iq4_nl": Layout(("d", nibbles), levels=_IQ4_LEVELS),
        "mxfp4": Layout(("e", nibbles), levels=_FP4_LEVELS),
        "q2_k": Layout(
            (Scales(16, _pack_nibbles, _unpack_nibbles), pairs, "d", "m"), scale_range=(0, 15)
        ),
        "q3_k": Layout(
            (Codes(2, 1, 256), pairs, Scales(12, _pack_signed_six, _unpack_signed_six), "d"),
            zero=4,
            scale_range=(-32, 31),
            bias=32,
        ),
        "q4_k": Layout(("d", "m", six, Codes(0, 4, 64)), scale_range=(0, 63)),
        "q5_k": Layout(("d", "m", six, Codes(4, 1, 256), Codes(0, 4, 64)), scale_range=(0, 63)),
        "q6_k": Layout(
            (Codes(0, 4, 128), Codes(4, 2, 128), Scales(16, _pack_bytes, _unpack_bytes), "d"),
            zero=32,
            scale_range=(-128, 127),
            bias=128,
        ),
        "iq4_xs": Layout(
            ("d", Scales(6, _pack_eights, _unpack_eights), nibbles),
            levels=_IQ4_LEVELS,
            scale_range=(-32, 31),
            bias=32,
        ),
    }

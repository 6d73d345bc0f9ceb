"""Formats: what a weight is stored as, and how many bytes that takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .._base.hints import did_you_mean

PER_CHANNEL = 0
PER_TENSOR = -1

_GROUPS = {"32": 32, "64": 64, "128": 128, "256": 256, "c": PER_CHANNEL, "t": PER_TENSOR}
_FLOATS = {"bf16": ("bfloat16", 2), "fp16": ("float16", 2), "fp32": ("float32", 4)}
_FLOAT_OF_DTYPE = {dtype: name for name, (dtype, _) in _FLOATS.items()}
_INTEGER = re.compile(r"int([1-8])-g(32|64|128|256|c|t)(-asym)?")
_PLANNED = re.compile(r"nf4-.*|fp[468]-.*|mxfp[68]|nvfp4|cb\d+-.*|.*\+(sp|lr)[\d.]+")
_ITEM_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Block:
    """A block format of llama.cpp: a fixed number of weights of a row in a fixed number of bytes.

    Attributes:
        bits: Bits per code.
        block_size: Weights per block; a row ends with a whole block.
        nbytes: Bytes per block: codes and all scales.
        group_size: Weights that share a scale within a block.
        symmetric: Whether groups have no minimum of their own.
    """

    bits: int
    block_size: int
    nbytes: int
    group_size: int
    symmetric: bool


BLOCKS = {
    "q4_0": Block(4, 32, 18, 32, True),  # this one, q5_0 and q8_0 are called int4-g32, ... here
    "q5_0": Block(5, 32, 22, 32, True),
    "q8_0": Block(8, 32, 34, 32, True),
    "q4_1": Block(4, 32, 20, 32, False),
    "q5_1": Block(5, 32, 24, 32, False),
    "iq4_nl": Block(4, 32, 18, 32, True),
    "mxfp4": Block(4, 32, 17, 32, True),
    "q2_k": Block(2, 256, 84, 16, False),
    "q3_k": Block(3, 256, 110, 16, True),
    "q4_k": Block(4, 256, 144, 32, False),
    "q5_k": Block(5, 256, 176, 32, False),
    "q6_k": Block(6, 256, 210, 16, True),
    "iq4_xs": Block(4, 256, 136, 32, True),
}
INTEGER_BLOCKS = {"q4_0": "int4-g32", "q5_0": "int5-g32", "q8_0": "int8-g32"}


@dataclass(frozen=True, slots=True)
class Format:
    """One candidate representation of a weight matrix [rows, cols].

    Integer formats store b-bit codes c and, for every group of ``group_size`` weights along a
    row, a float16 scale s; the weight is s * (c - z).  An asymmetric format stores the integer
    zero point z of every group, a symmetric one has the implicit ``zero_point``.

    Attributes:
        name: The canonical spec, such as ``int4-g64-asym`` or ``bf16``.
        kind: ``int`` for codes with scales, ``float`` for plain weights, ``block`` for the
            blocks of llama.cpp, whose codes and scales are interleaved.
        bits: Bits per code, without scales and zero points.
        group_size: Weights per scale; ``PER_CHANNEL`` or ``PER_TENSOR`` for one per row or one
            for all.  Meaningless for ``float``.
        symmetric: Whether the zero point is implicit.  True for ``float``.
    """

    name: str
    kind: Literal["int", "float", "block"]
    bits: int
    group_size: int
    symmetric: bool

    @staticmethod
    def parse(spec: str) -> Format:
        """Read ``int{1..8}-g{32|64|128|256|c|t}[-asym]``, ``bf16``, ``q4_k``, ``iq4_nl``, ...

        Raises:
            ValueError: If ``spec`` is not such a name; the nearest ones are given.
        """
        if match := _INTEGER.fullmatch(spec):
            bits, group, asymmetric = match.groups()
            return Format(spec, "int", int(bits), _GROUPS[group], asymmetric is None)
        if spec in _FLOATS:
            return Format(spec, "float", 8 * _FLOATS[spec][1], PER_CHANNEL, True)
        if spec in INTEGER_BLOCKS:
            return Format.parse(INTEGER_BLOCKS[spec])
        if block := BLOCKS.get(spec):
            return Format(spec, "block", block.bits, block.group_size, block.symmetric)
        if _PLANNED.fullmatch(spec):
            raise ValueError(
                f"Format {spec!r} is not available in this version of bitplan. "
                "Use an integer format such as 'int4-g64-asym', or bf16, fp16, fp32."
            )
        raise ValueError(
            f"Unknown format {spec!r}.{did_you_mean(spec, _all_names(), count=3)} "
            "The grammar is int{1..8}-g{32|64|128|256|c|t}[-asym], bf16, fp16, fp32, and for "
            f"llama.cpp {', '.join(BLOCKS)}."
        )

    @staticmethod
    def integer(bits: int, group_size: int, symmetric: bool) -> Format:
        """The integer format with these properties."""
        group = {size: text for text, size in _GROUPS.items()}[group_size]
        return Format.parse(f"int{bits}-g{group}{'' if symmetric else '-asym'}")

    def __str__(self) -> str:
        return self.name

    @property
    def zero_point(self) -> float:
        """The implicit zero point of a symmetric format: 2^(b-1).

        One bit is the exception: 1/2, so that its two levels are -s/2 and +s/2.  With the zero
        point 1 they would be -s and 0, which loses half of the weights.
        """
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    @property
    def block_size(self) -> int:
        """Weights that rows are stored in multiples of; 1 unless this is a block format."""
        return BLOCKS[self.name].block_size if self.kind == "block" else 1

    def groups(self, cols: int) -> int:
        """Scales per row of a matrix with ``cols`` columns; the last group may be short."""
        if self.kind == "block":
            return math.ceil(cols / self.block_size) * (self.block_size // self.group_size)
        return math.ceil(cols / self.group_size) if self.group_size > 0 else 1

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every tensor that stores a [rows, cols] weight.

        ``codes`` are packed LSB-first, each row starting at a byte; ``zero`` is one LSB-first
        stream of b-bit zero points in the order of the scales.  ``blocks`` are what llama.cpp
        stores; the last block of a row may be padded.
        """
        rows, cols = shape
        if self.kind == "block":
            row = math.ceil(cols / self.block_size) * BLOCKS[self.name].nbytes
            return {"blocks": ((rows, row), "uint8")}
        if self.kind == "float":
            return {"weight": ((rows, cols), _FLOATS[self.name][0])}
        scales = (1, 1) if self.group_size == PER_TENSOR else (rows, self.groups(cols))
        parts: dict[str, tuple[tuple[int, ...], str]] = {
            "codes": ((rows, math.ceil(cols * self.bits / 8)), "uint8"),
            "scale": (scales, "float16"),
        }
        if not self.symmetric:
            parts["zero"] = ((math.ceil(math.prod(scales) * self.bits / 8),), "uint8")
        return parts

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the serialized tensors of a [rows, cols] weight: the only memory formula."""
        return sum(
            math.prod(part) * _ITEM_BYTES[dtype] for part, dtype in self.tensors(shape).values()
        )


def resolve_formats(specs: Sequence[str], source: str) -> tuple[Format, ...]:
    """Parse format names, dropping duplicates and keeping the order.

    Args:
        specs: Format names; ``keep`` means the dtype the model came in.
        source: That dtype, as a format (``bf16``) or dtype name (``bfloat16``).

    Returns:
        The distinct formats.

    Raises:
        ValueError: If a name is unknown or nothing is left.
    """
    kept = _FLOAT_OF_DTYPE.get(source, source)
    formats = dict.fromkeys(Format.parse(kept if spec == "keep" else spec) for spec in specs)
    if not formats:
        raise ValueError("No format was given. Name at least one, for example 'int4-g64-asym'.")
    return tuple(formats)


def _all_names() -> list[str]:
    integers = [f"int{b}-g{g}{z}" for b in range(1, 9) for g in _GROUPS for z in ("", "-asym")]
    return [*integers, *_FLOATS, *BLOCKS, "keep"]

"""The block formats of llama.cpp by name: how many weights they hold in how many bytes."""

from __future__ import annotations

from dataclasses import dataclass


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

"""Plane packing, whatever the width, group, shape, order and cell: nothing is lost or wasted."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.kernels.blocks import Block
from bitplan.kernels.packing import PlanePack, resident_bytes
from bitplan.kernels.planes import CELLS, ORDERS, Cell, Order, fields, pack_cells, unpack_cells
from bitplan.tests.packs import random_packed

integers = st.builds(
    lambda bits, group, zero: f"int{bits}-g{group}{zero}",
    st.integers(1, 8),
    st.sampled_from(["32", "64", "128", "256", "c", "t"]),
    st.sampled_from(["", "-asym"]),
)
seeds = st.integers(0, 2**32 - 1)


@given(st.integers(1, 8), st.sampled_from(CELLS), st.sampled_from(ORDERS), seeds)
@settings(max_examples=40, deadline=None)
def test_cells_keep_every_code_in_exactly_b_bits(
    bits: int, cell: Cell, order: Order, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * cell.rows, 3 * cell.cols)
    codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=generator)
    words = pack_cells(codes, bits, cell, order)
    assert 8 * words.nbytes == bits * codes.numel()
    assert torch.equal(unpack_cells(words, cell, order), codes)


@given(st.integers(1, 8))
def test_fields_fill_half_words_once(bits: int) -> None:
    used = [
        (f.plane, f.shift + i) for t in range(16) for f in fields(bits, t) for i in range(f.width)
    ]
    assert sorted(used) == [(plane, bit) for plane in range(bits) for bit in range(16)]
    for slot in range(16):
        kept = [f.bit + i for f in fields(bits, slot) for i in range(f.width)]
        assert sorted(kept) == list(range(bits))


@given(
    integers,
    st.tuples(st.integers(1, 300), st.integers(1, 500)),
    st.sampled_from(ORDERS),
    st.sampled_from(["code", "half"]),
    st.sampled_from([None, *CELLS]),
    seeds,
)
@settings(max_examples=60, deadline=None)
def test_a_pack_is_the_weight_and_takes_the_bytes_foretold(
    spec: str, shape: tuple[int, int], order: Order, zero: str, cell: Cell | None, seed: int
) -> None:
    packed = random_packed(spec, shape, torch.Generator().manual_seed(seed))
    block = Block.of(packed, zero="half" if zero == "half" else "code")
    pack = PlanePack.from_blocks([block], shape, order, cell)
    assert torch.equal(pack.dequantize(), packed.dequantize())
    assert pack.nbytes == resident_bytes(
        packed.fmt, shape, "half" if zero == "half" else "code", cell
    )


@given(
    st.lists(integers, min_size=4, max_size=4),
    st.sampled_from([64, 128]),
    st.sampled_from([64, 192, 256]),
    st.integers(1, 150),
    st.integers(1, 200),
    st.sampled_from(ORDERS),
    seeds,
)
@settings(max_examples=40, deadline=None)
def test_widths_mix_in_one_matrix(
    specs: list[str], row: int, col: int, rows: int, cols: int, order: Order, seed: int
) -> None:
    """Four quadrants with borders at ``row`` and ``col``, each in a format of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (row + rows, col + cols)
    whole, blocks = torch.zeros(shape), []
    corners = [(0, 0, row, col), (0, col, row, cols), (row, 0, rows, col), (row, col, rows, cols)]
    for spec, (top, left, height, width) in zip(specs, corners, strict=True):
        packed = random_packed(spec, (height, width), generator)
        whole[top : top + height, left : left + width] = packed.dequantize()
        blocks.append(Block.of(packed, top, left))
    pack = PlanePack.from_blocks(blocks[::-1], shape, order)
    assert torch.equal(pack.dequantize(), whole)


@given(
    st.sampled_from([f"nf4-g{g}{r}" for g in ("32", "64", "c") for r in ("", "+lr3")]),
    st.tuples(st.integers(1, 300), st.integers(1, 500)),
    st.sampled_from(ORDERS),
)
@settings(max_examples=30, deadline=None)
def test_a_table_of_levels_is_laid_out_too(spec: str, shape: tuple[int, int], order: Order) -> None:
    packed = random_packed(spec, shape)
    pack = PlanePack.from_packed(packed, order)
    assert torch.equal(pack.dequantize(), packed.coded().dequantize())
    factors = sum(packed.tensors[name].nbytes for name in packed.tensors.keys() & {"left", "right"})
    assert pack.nbytes + factors == resident_bytes(packed.fmt, shape)

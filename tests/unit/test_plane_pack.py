"""Plane packing: small layers waste nothing, and what does not fit is refused."""

import pytest
import torch

from bitplan.kernels.blocks import Block, PlaneClass
from bitplan.kernels.packing import PlanePack, choose_cell, resident_bytes
from bitplan.kernels.planes import CELLS, Cell, digits
from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import PackedTensor
from bitplan.tests.packs import random_packed


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
def test_the_layers_of_a_small_model_need_no_padding(shape: tuple[int, int]) -> None:
    cell = choose_cell(shape)
    assert shape[0] % cell.rows == shape[1] % cell.cols == 0
    fmt = Format.parse("int4-g64-asym")
    assert resident_bytes(fmt, shape) < 1.01 * fmt.stored_bytes(shape)


def test_the_largest_cell_of_equals() -> None:
    assert choose_cell((4096, 14336)) == Cell(128, 128)
    assert choose_cell((4096, 64)) == Cell(128, 64)
    assert choose_cell((1, 1)) == Cell(64, 64)


def test_a_float_weight_stays_as_it_is() -> None:
    assert resident_bytes(Format.parse("bf16"), (3, 5)) == 30
    with pytest.raises(ValueError, match="A bf16 weight has no codes"):
        PlanePack.from_packed(PackedTensor.pack(torch.ones(64, 64), Format.parse("bf16"), None))


def test_digits() -> None:
    assert [digits(bits) for bits in (1, 3, 4, 7, 8)] == [[1], [2, 1], [4], [4, 2, 1], [8]]


def test_scales_of_a_whole_row_are_stored_once() -> None:
    """Not once per cell, and a per-tensor scale takes no more than one per channel."""
    wide = (128, 4096)
    channel = resident_bytes(Format.parse("int4-gc"), wide)
    assert channel == resident_bytes(Format.parse("int4-gt"), wide)
    assert channel == 128 * 4096 // 2 + 4 * 32 + 2 * 128 + 32


def test_real_zero_points() -> None:
    """``half`` takes zero points that are no integers, as other methods make them."""
    codes = torch.randint(16, (64, 128), dtype=torch.uint8)
    scale = torch.full((64, 2), 0.5)
    zero = torch.full((64, 2), 7.25)
    pack = PlanePack.from_blocks(
        [Block(0, 0, codes, scale, zero, PlaneClass(4, 64, "half"))], (64, 128)
    )
    assert torch.equal(pack.dequantize(), (codes.float() - 7.25) * 0.5)


def test_a_table_of_values() -> None:
    book = torch.linspace(-1, 1, 8) ** 3
    codes = torch.randint(8, (70, 100), dtype=torch.uint8)
    scale = torch.rand(70, 2).half()
    block = Block(0, 0, codes, scale, None, PlaneClass(3, 64, "table"))
    pack = PlanePack.from_blocks([block], (70, 100), codebook=book)
    expected = book[codes.long()] * scale.float().repeat_interleave(64, 1)[:, :100]
    assert torch.equal(pack.dequantize(), expected)
    with pytest.raises(ValueError, match=r"\[3\] bits index a table of 16 values"):
        PlanePack.from_blocks([block], (70, 100), codebook=torch.zeros(16))
    with pytest.raises(ValueError, match="table of 0 values"):
        PlanePack.from_blocks([block], (70, 100))


def test_a_scale_beyond_float16() -> None:
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    block = Block(0, 0, codes, torch.full((64, 1), 300.0), None, PlaneClass(8, 0, "none"))
    with pytest.raises(ValueError, match="A scale of 300 is too large"):
        PlanePack.from_blocks([block], (64, 64))


@pytest.mark.parametrize(
    ("corners", "message"),
    [
        ([(0, 0), (32, 0)], "begins at row 32, column 0"),
        ([(0, 0)], r"cover row 64, column 0 of a weight \[192, 64\] 0 times"),
        ([(0, 0), (0, 0), (64, 0), (128, 0)], "cover row 0, column 0 .* 2 times"),
        ([(0, 0), (64, 0), (192, 0)], "at row 192, column 0 does not consist of whole"),
    ],
)
def test_blocks_that_do_not_fit(corners: list[tuple[int, int]], message: str) -> None:
    packed = random_packed("int2-g64", (64, 64))
    with pytest.raises(ValueError, match=message):
        PlanePack.from_blocks([Block.of(packed, *corner) for corner in corners], (192, 64))


def test_a_border_inside_a_cell() -> None:
    blocks = [
        Block.of(random_packed("int2-g64", (70, 64)), 0, 0),
        Block.of(random_packed("int3-g64", (58, 64)), 64, 0),
    ]
    with pytest.raises(ValueError, match=r"A block \[70, 64\] at row 0"):
        PlanePack.from_blocks(blocks, (122, 64))


def test_moving_a_pack() -> None:
    pack = PlanePack.from_packed(random_packed("int3-g32-asym", (64, 64)))
    moved = pack.to("meta")
    assert moved.words.is_meta
    assert moved.cell in CELLS
    assert moved.nbytes == pack.nbytes

"""Block formats: the bytes are llama.cpp's, the fit is at least as good as uniform scales."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from bitplan.quantizers.block_sizes import BLOCKS, INTEGER_BLOCKS
from bitplan.quantizers.blocks import layouts, pack_blocks, unpack_blocks
from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import line_of, nearest_level, render
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor

fit_grid = METHODS.trait("rtn", "grid")
NAMES = [name for name in BLOCKS if name not in INTEGER_BLOCKS]


def weight(rows: int = 24, cols: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made = 0.02 * torch.randn(rows, cols, generator=generator)
    made *= torch.randn(rows, 1, generator=generator).exp()
    made[3] = 0  # nothing, half of nothing, one sign only, one large weight
    made[4, :300] = 0
    made[5].abs_()
    made[6].abs_().neg_()
    made[7, 5] = 3
    return made


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_are_those_of_ggml(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[kind(name)] == (BLOCKS[name].block_size, BLOCKS[name].nbytes)
    assert set(layouts()) == set(BLOCKS)


@pytest.mark.parametrize("name", NAMES)
def test_packed_blocks_mean_the_same_to_ggml_bit_for_bit(name: str) -> None:
    fmt, original = Format.parse(name), weight()
    packed = PackedTensor.pack(original, fmt, fit_grid(original, fmt))
    rendered = render(original, fmt, fit_grid(original, fmt))
    assert packed.nbytes == fmt.stored_bytes((24, 512))
    assert np.array_equal(dequantize(packed.tensors["blocks"].numpy(), kind(name)), rendered)
    assert torch.equal(packed.dequantize(), rendered)
    rows = torch.tensor([7, 3])
    assert torch.equal(packed.dequantize(rows), rendered[rows])
    grid = packed.grid()
    assert grid is not None
    for kept, fitted in zip(grid, fit_grid(original, fmt) or (), strict=True):
        assert (kept is None) == (fitted is None)
        assert kept is None or fitted is None or torch.equal(kept, fitted)


@pytest.mark.parametrize("name", BLOCKS)
def test_any_bytes_survive_unpacking_and_packing(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (5, 2 * BLOCKS[name].nbytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    codes, d, m, scales, mins = unpack_blocks(name, blocks)
    assert torch.equal(pack_blocks(name, codes, d, m, scales, mins), blocks)
    assert int(codes.max()) < 2 ** BLOCKS[name].bits


@pytest.mark.parametrize("name", ["q4_1", "q5_1", "mxfp4"])
def test_fits_lose_less_than_the_reference_quantizer(name: str) -> None:
    fmt, original = Format.parse(name), weight()
    theirs = torch.from_numpy(dequantize(quantize(original.numpy(), kind(name)), kind(name)))
    ours = render(original, fmt, fit_grid(original, fmt))
    assert (ours - original).square().sum() < (theirs - original).square().sum()


@pytest.mark.parametrize(
    ("name", "most"),
    [("q2_k", 0.09), ("q3_k", 0.03), ("q4_k", 7e-3), ("q5_k", 1.7e-3), ("q6_k", 5e-4)],
)
def test_relative_error_of_a_normal_weight(name: str, most: float) -> None:
    original = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    fmt = Format.parse(name)
    error = render(original, fmt, fit_grid(original, fmt)) - original
    assert error.square().sum() / original.square().sum() < most


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_end_within_a_block(name: str) -> None:
    fmt, original = Format.parse(name), weight(24, 300)
    packed = PackedTensor.pack(original, fmt, fit_grid(original, fmt))
    assert packed.nbytes == fmt.stored_bytes((24, 300))
    rendered = render(original, fmt, fit_grid(original, fmt))
    assert torch.equal(packed.dequantize(), rendered)
    theirs = dequantize(packed.tensors["blocks"].numpy(), kind(name))
    assert np.array_equal(theirs[:, :300], rendered)


@pytest.mark.parametrize("name", ["iq4_nl", "mxfp4"])
def test_the_nearest_level_is_nearest(name: str) -> None:
    levels = torch.tensor(layouts()[name].levels, dtype=torch.float32)
    values = torch.linspace(-150, 150, 4001)
    distance = (values - levels[nearest_level(values, levels).long()]).abs()
    assert torch.allclose(distance, (values[:, None] - levels).abs().amin(1), atol=1e-4)


def test_the_formula_of_a_q4_k_block() -> None:
    """By hand: weight = d * scale * code - m * minimum."""
    fmt = Format.parse("q4_k")
    codes = (torch.arange(256) % 16).to(torch.uint8).view(1, 256)
    scales, mins = (torch.arange(8, dtype=torch.uint8).view(1, 8) + k for k in (50, 3))
    d, m = torch.tensor([[0.5]]).half(), torch.tensor([[0.25]]).half()
    blocks = pack_blocks("q4_k", codes, d, m, scales, mins)
    found = PackedTensor(fmt, (1, 256), {"blocks": blocks}).dequantize()
    group = torch.arange(256) // 32
    assert torch.equal(found[0], 0.5 * (50 + group) * codes[0] - 0.25 * (3 + group))
    line = line_of(fmt, PackedTensor(fmt, (1, 256), {"blocks": blocks}).grid())  # type: ignore[arg-type]
    assert line.scale.shape == (1, 8)


def test_names_of_integer_blocks_are_formats_of_ours() -> None:
    assert Format.parse("q4_0") == Format.parse("int4-g32")
    for name, ours in INTEGER_BLOCKS.items():
        shape = (3, 64)
        assert Format.parse(ours).stored_bytes(shape) == 3 * 2 * BLOCKS[name].nbytes

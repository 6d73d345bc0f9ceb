"""Packers of other runtimes' tensors: against a bit-by-bit reading, and there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitplan.exporters.layouts import packing
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods.rtn import fit_grid
from bitplan.quantizers.packed import PackedTensor

ROWS, COLS = 64, 128


def weight(spec: str, rows: int = ROWS, cols: int = COLS, seed: int = 0) -> PackedTensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator)
    fmt = Format.parse(spec)
    return PackedTensor.pack(matrix, fmt, fit_grid(matrix, fmt))


def assert_same(left: PackedTensor, right: PackedTensor) -> None:
    assert left.fmt == right.fmt and left.shape == right.shape
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name]), name


def bits_of(words: list[int], start: int, count: int) -> int:
    """The number that ``count`` bits from ``start`` on spell in a stream of 32-bit words."""
    stream: int = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    mask: int = 2**count - 1
    return (stream >> start) & mask


formats = st.builds(
    "int{}-g{}{}".format,
    st.integers(2, 8),
    st.sampled_from(["32", "64", "128", "c"]),
    st.sampled_from(["", "-asym"]),
)


@given(formats, st.integers(0, 3))
def test_there_and_back(spec: str, seed: int) -> None:
    packed = weight(spec, seed=seed)
    fmt = packed.fmt
    assert_same(packing.from_compressed_tensors(packing.to_compressed_tensors(packed), fmt), packed)
    assert_same(packing.from_gptq(packing.to_gptq(packed, False), fmt, False), packed)
    assert_same(packing.from_mlx(packing.to_mlx(packed), fmt), packed)
    if fmt.symmetric:
        assert_same(packing.from_gptq(packing.to_gptq(packed, True), fmt, True), packed)
    tensors = packing.to_matmul_nbits(packed)
    assert_same(packing.from_matmul_nbits(tensors, fmt, COLS), packed)


@pytest.mark.parametrize("spec", ["int2-g32", "int3-g64-asym", "int5-g32", "int8-g128-asym"])
def test_words_hold_the_codes_where_the_formats_say(spec: str) -> None:
    packed = weight(spec)
    bits, size = packed.fmt.bits, packed.fmt.group_size
    scale, zero = packing.grid_of(packed)
    dense = packed.dequantize()
    pressed = packing.to_compressed_tensors(packed)
    gptq = packing.to_gptq(packed, offset_zeros=False)
    mlx = packing.to_mlx(packed)
    for row, col in [(0, 0), (5, 31), (17, 63), (63, 127), (30, 10), (31, 11)]:
        group = col // size
        s, z = float(scale[row, group]), int(zero[row, group])
        for words in (
            pressed["weight_packed"][row],
            gptq["qweight"][:, row],
            mlx["weight"][row].view(torch.int32),
        ):
            assert s * (bits_of(words.tolist(), col * bits, bits) - z) == dense[row, col]
        assert bits_of(gptq["qzeros"][group].tolist(), row * bits, bits) == z
        assert gptq["scales"][group, row] == scale[row, group]
        assert gptq["g_idx"][col] == group
        if not packed.fmt.symmetric:
            column = pressed["weight_zero_point"][:, group].tolist()
            assert bits_of(column, row * bits, bits) == z
        assert float(mlx["biases"][row, group]) == -z * s


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_nbits_blocks(bits: int) -> None:
    packed = weight(f"int{bits}-g32-asym", rows=3, cols=96)
    tensors = packing.to_matmul_nbits(packed)
    assert tensors["B"].shape == (3, 3, 32 * bits // 8)
    assert tensors["zero_points"].shape == (3, -(-3 * bits // 8))
    block = int.from_bytes(bytes(tensors["B"][2, 1].tolist()), "little")
    zeros = int.from_bytes(bytes(tensors["zero_points"][2].tolist()), "little")
    mask = 2**bits - 1
    short = packing.to_matmul_nbits(weight("int4-g32", rows=3, cols=40))
    assert short["B"].shape == (3, 2, 16) and not short["B"][:, 1, 4:].any()
    code, zero = (block >> (7 * bits)) & mask, (zeros >> bits) & mask
    assert float(tensors["scales"][2, 1]) * (code - zero) == packed.dequantize()[2, 32 + 7]


def test_mlx_keeps_symmetric_scales_in_half_precision() -> None:
    symmetric, asymmetric = (packing.to_mlx(weight(s)) for s in ("int8-g32", "int8-g32-asym"))
    assert symmetric["scales"].dtype == symmetric["biases"].dtype == torch.float16
    assert asymmetric["scales"].dtype == asymmetric["biases"].dtype == torch.float32


@pytest.mark.parametrize("spec", ["int4-g32-asym", "int3-gc", "int8-g64"])
def test_blocks_of_rows_are_weights_of_their_own(spec: str) -> None:
    packed = weight(spec)
    blocks = packing.split_rows(packed, [7, 40])
    assert [block.shape[0] for block in blocks] == [7, 33, 24]
    together = torch.cat([block.dequantize() for block in blocks])
    assert torch.equal(together, packed.dequantize())


def test_a_scale_of_the_whole_tensor_is_repeated() -> None:
    packed = weight("int4-gt")
    tensors = packing.to_compressed_tensors(packed)
    assert tensors["weight_scale"].shape == (ROWS, 1)
    assert (tensors["weight_scale"] == packed.tensors["scale"]).all()


def test_odd_rows_are_padded_to_a_word() -> None:
    packed = weight("int3-gc-asym", rows=5, cols=7)
    tensors = packing.to_compressed_tensors(packed)
    assert tensors["weight_packed"].shape == (5, 1)
    assert tensors["weight_zero_point"].shape == (1, 1)
    assert_same(packing.from_compressed_tensors(tensors, packed.fmt), packed)


def test_what_cannot_be_packed_says_why() -> None:
    with pytest.raises(ValueError, match="no integer zero point"):
        packing.to_compressed_tensors(weight("int1-g32"))
    with pytest.raises(ValueError, match="no integer zero point"):
        packing.to_mlx(PackedTensor.pack(torch.ones(2, 2), Format.parse("bf16"), None))
    with pytest.raises(ValueError, match="32 rows and columns together, not 5 x 64"):
        packing.to_gptq(weight("int4-g32", rows=5, cols=64), offset_zeros=False)
    with pytest.raises(ValueError, match="cannot store the zero point 0"):
        positive = torch.rand(32, 32)
        fmt = Format.parse("int4-g32-asym")
        packed = PackedTensor.pack(positive, fmt, fit_grid(positive, fmt))
        packing.to_gptq(packed, offset_zeros=True)

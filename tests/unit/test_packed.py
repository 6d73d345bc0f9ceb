"""Packed tensors: bit order, parts and dequantization."""

import pytest
import torch

from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import render
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor, pack_bits, unpack_bits

fit_grid = METHODS.trait("rtn", "grid")


def pack(spec: str, rows: int = 6, cols: int = 100) -> tuple[torch.Tensor, PackedTensor]:
    """A random weight, rendered in a format, and the same weight packed."""
    fmt = Format.parse(spec)
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    grid = fit_grid(weight, fmt)
    return render(weight, fmt, grid), PackedTensor.pack(weight, fmt, grid)


def test_bits_are_packed_least_significant_first() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1]], dtype=torch.uint8)
    stream = sum(int(code) << (3 * i) for i, code in enumerate(codes[0]))
    assert pack_bits(codes, 3).tolist() == [list(stream.to_bytes(4, "little"))]
    assert pack_bits(codes % 2, 1).tolist() == [[0b01010101, 1]]


def test_every_row_starts_at_a_byte() -> None:
    codes = torch.tensor([[1], [2]], dtype=torch.uint8)
    assert pack_bits(codes, 2).tolist() == [[1], [2]]
    assert unpack_bits(pack_bits(codes, 2), 2, 1).tolist() == codes.tolist()


@pytest.mark.parametrize(
    "spec", ["int4-g64-asym", "int3-g32", "int5-gc-asym", "int7-gt-asym", "int8-g64", "bf16"]
)
def test_dequantized_is_rendered(spec: str) -> None:
    rendered, packed = pack(spec)
    assert torch.equal(packed.dequantize(), rendered)
    assert torch.equal(packed.dequantize(slice(2, 4)), rendered[2:4])
    assert packed.dequantize(dtype=torch.float16).dtype == torch.float16
    assert packed.nbytes == packed.fmt.stored_bytes(packed.shape)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_have_the_zero_points_that_lie_anywhere_in_a_byte(bits: int) -> None:
    rendered, packed = pack(f"int{bits}-g32-asym", rows=7)
    for rows in (slice(1, 6, 2), slice(6, None), torch.tensor([6, 0, 3, 3]), torch.arange(7) > 4):
        assert torch.equal(packed.dequantize(rows), rendered[rows])


def test_int4_g64_asym_takes_exactly_4_3125_bits() -> None:
    packed = pack("int4-g64-asym", rows=192, cols=576)[1]
    assert 8 * packed.nbytes == 4.3125 * 192 * 576


def test_bytes_are_stable() -> None:
    weight = torch.arange(-8, 8).view(2, 8) / 8.0
    fmt = Format.parse("int4-gt")
    packed = PackedTensor.pack(weight, fmt, fit_grid(weight, fmt))
    assert packed.tensors["scale"].tolist() == [[0.125]]
    assert bytes(packed.tensors["codes"].flatten().tolist()).hex() == "1032547698badcfe"


def test_wrong_parts_are_refused() -> None:
    packed = pack("int4-g64-asym")[1]
    parts = dict(packed.tensors)
    with pytest.raises(ValueError, match=r"consists of codes, scale, zero, but codes, scale"):
        PackedTensor(packed.fmt, packed.shape, {k: parts[k] for k in ("codes", "scale")})
    with pytest.raises(ValueError, match=r"'scale' .* must be float16 \[6, 2\], but is float32"):
        PackedTensor(packed.fmt, packed.shape, parts | {"scale": parts["scale"].float()})
    with pytest.raises(
        ValueError, match=r"'codes' .* must be uint8 \[6, 50\], but is .* \[5, 50\]"
    ):
        PackedTensor(packed.fmt, packed.shape, parts | {"codes": parts["codes"][:5]})


def test_codes_of_one_row_may_be_a_transposed_column() -> None:
    column = torch.arange(16, dtype=torch.uint8)[:, None] % 8
    assert torch.equal(pack_bits(column.T, 3), pack_bits(column.T.clone().reshape(1, 16), 3))

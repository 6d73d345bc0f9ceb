"""The compiled decoding of packed codes: bit for bit what torch makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.quantizers import native_decoding
from bitplan.quantizers.format import Format
from bitplan.quantizers.lines import Line, dequantize
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor, pack_bits
from bitplan.sensitivity import native_products

needs_compiler = pytest.mark.skipif(
    native_decoding.LIBRARY.find()[0] is None, reason="there is no C++ compiler"
)


@needs_compiler
@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 150),
    st.sampled_from([8, 32, 64, 0]),
    st.sampled_from(["zeros", "one zero", "levels"]),
    st.integers(0, 2**31),
)
def test_it_is_what_torch_does(
    bits: int, rows: int, cols: int, size: int, kind: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=draw, dtype=torch.uint8)
    groups = -(-cols // size) if size else 1
    scale = torch.randn(rows, groups, generator=draw).half().float()
    zero = torch.randint(0, 2**bits, (rows, groups), generator=draw, dtype=torch.uint8)
    before = torch.randint(0, 2**bits, (seed % 11,), generator=draw, dtype=torch.uint8)
    stream = pack_bits(torch.cat([before, zero.flatten()])[None], bits)[0]
    levels = torch.randn(2**bits, generator=draw).sort().values
    line = {
        "zeros": Line(scale, zero.float()),
        "one zero": Line(scale, torch.tensor(2.0 ** (bits - 1))),
        "levels": Line(scale, torch.tensor(0.0), None, levels),
    }[kind]
    expected = codes.float()
    dequantize(expected, line, size)
    zeros = (stream, len(before)) if kind == "zeros" else None
    if zeros:
        line = line._replace(zero=torch.tensor(0.0))  # is not looked at
    found = native_decoding.decode(pack_bits(codes, bits), bits, cols, line, size, zeros)
    assert found is not None and torch.equal(found, expected)


@needs_compiler
def test_groups_that_begin_within_a_byte_are_left_to_torch() -> None:
    line = Line(torch.ones(2, 4), torch.tensor(0.0))
    packed = pack_bits(torch.zeros(2, 20, dtype=torch.uint8), 3)
    assert native_decoding.decode(packed, 3, 20, line, 5) is None
    with_offset = Line(torch.ones(2, 3), torch.tensor(0.0), torch.ones(2, 3))
    assert native_decoding.decode(packed, 3, 20, with_offset, 8) is None


@pytest.mark.parametrize(
    "name", ["int3-g32-asym", "int5-gt-asym", "int7-gc-asym", "int4-gc", "nf4-g64"]
)
@pytest.mark.parametrize("rows", [slice(3, 9), slice(5, 5), slice(7, None), slice(1, 11, 2)])
def test_some_rows_are_rows_of_the_whole(name: str, rows: slice) -> None:
    weight = torch.randn(11, 168, generator=torch.Generator().manual_seed(0))
    packed: PackedTensor = METHODS.get("rtn")(weight, Format.parse(name), Evidence())
    assert torch.equal(packed.dequantize(rows), packed.dequantize()[rows])


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    packed = METHODS.get("rtn")(weight, Format.parse("int3-g32-asym"), Evidence())
    expected = packed.dequantize()
    monkeypatch.setattr(native_decoding.LIBRARY, "_found", (None, "none here"))
    assert torch.equal(packed.dequantize(), expected)


@needs_compiler
@pytest.mark.parametrize("samples", [1, 6, 7, 13])
@pytest.mark.parametrize("formats", [1, 2, 5])
def test_products_of_gradients_and_errors(samples: int, formats: int) -> None:
    draw = torch.Generator().manual_seed(samples)
    gradients = torch.randn(samples, 4099, generator=draw)
    errors = torch.randn(formats, 4099, generator=draw)
    found = native_products.products(gradients, errors)
    assert found is not None
    g, e = gradients.double(), errors.double()
    torch.testing.assert_close(found[0], g @ e.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], g.square() @ e.square().T, rtol=1e-6, atol=0.0)

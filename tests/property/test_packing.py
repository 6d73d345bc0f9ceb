"""Packing and rendering hold for every width, shape and group size."""

import struct
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.models.packed_modules import PackedLinear
from bitplan.quantizers.checkpoint import FILE_NAME, write_checkpoint
from bitplan.quantizers.format import Format, families
from bitplan.quantizers.grid import Grid, decode, encode, grid_rows, render
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor, pack_bits, unpack_bits

fit_grid = METHODS.trait("rtn", "grid")

integers = st.builds(
    Format.of_integers, st.integers(1, 8), st.sampled_from([32, 64, 128, 256, 0, -1]), st.booleans()
)
formats = integers | st.sampled_from(
    [Format.parse(name) for family in families() for name in family.examples]
)
coded = formats.filter(lambda fmt: not fmt.floating)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Weights [rows, cols] of any scale, some with outliers, offsets and rows of zeros."""
    rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, cols, generator=generator)
    weight = weight + draw(st.sampled_from([0, 0, 3, -3]))
    weight[0, 0] *= draw(st.sampled_from([1, 30]))
    weight[-1] *= draw(st.sampled_from([0, 1]))
    return weight * draw(st.sampled_from([1e-9, 1e-4, 0.02, 1, 20]))  # all formats hold these


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32))
def test_unpacking_inverts_packing(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, count), generator=generator, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@given(weights(), formats)
@settings(max_examples=60, deadline=None)
def test_stored_bytes_are_exact(weight: Tensor, fmt: Format) -> None:
    packed = PackedTensor.pack(weight, fmt, fit_grid(weight, fmt))
    expected = fmt.stored_bytes((weight.shape[0], weight.shape[1]))
    assert packed.nbytes == expected
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), {"layer": packed}, {}, {})
        content = (Path(folder) / FILE_NAME).read_bytes()
    assert len(content) - 8 - struct.unpack("<Q", content[:8])[0] == expected


@given(weights(), coded)
@settings(max_examples=100, deadline=None)
def test_rendering_is_decoding_the_codes(weight: Tensor, fmt: Format) -> None:
    grid = fit_grid(weight, fmt)
    rendered = render(weight, fmt, grid)
    packed = PackedTensor.pack(weight, fmt, grid)
    assert torch.equal(rendered, packed.dequantize())
    assert rendered.isfinite().all()
    if grid is not None and fmt.base is None and fmt.family != "trellis":  # codes say it all
        assert isinstance(grid, Grid)
        codes = encode(weight, fmt, grid)
        assert torch.equal(rendered, decode(codes, fmt, grid))
        again = PackedTensor.of_codes(codes, fmt, grid)
        assert all(torch.equal(again.tensors[name], packed.tensors[name]) for name in again.tensors)


@given(weights(), formats, st.data())
@settings(max_examples=100, deadline=None)
def test_a_row_is_the_same_alone_and_among_others(
    weight: Tensor, fmt: Format, data: st.DataObject
) -> None:
    """Rendered, decoded, in place, and from what was stored."""
    count = len(weight)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5)))
    grid = fit_grid(weight, fmt)
    packed = PackedTensor.pack(weight, fmt, grid)
    whole = render(weight, fmt, grid)
    some = weight[rows].clone()
    for found in (grid, packed.fitted()):
        assert torch.equal(render(some, fmt, grid_rows(found, rows)), whole[rows])
    assert torch.equal(packed.dequantize(rows), whole[rows])
    render(some, fmt, grid_rows(grid, rows), some)
    assert torch.equal(some, whole[rows])


def unclipped(weight: Tensor, fmt: Format) -> Grid:
    """The grid of one group [1, size] from its smallest to its largest weight."""
    low, high = weight.amin().clamp(max=0), weight.amax().clamp(min=0)
    if fmt.symmetric:
        scale = torch.maximum(high, -low) / fmt.zero_point
        return Grid(scale.half().view(1, 1), None)
    scale = (high - low) / (2**fmt.bits - 1)
    zero = torch.where(scale > 0, -low / scale, 0).round()
    return Grid(scale.half().view(1, 1), zero.to(torch.uint8).view(1, 1))


@given(weights(), st.integers(2, 8), st.booleans())
@settings(max_examples=100, deadline=None)
def test_clip_search_never_loses_to_no_clipping(weight: Tensor, bits: int, symmetric: bool) -> None:
    fmt = Format.of_integers(bits, -1, symmetric)
    salience = weight.abs() + weight.square().mean().sqrt()
    searched, plain = (
        float((render(weight, fmt, grid) - weight).square().mul(salience).sum())
        for grid in (fit_grid(weight, fmt), unclipped(weight, fmt))
    )
    assert searched <= plain * (1 + 1e-3) + 1e-30


@given(weights(), formats, st.booleans())
@settings(max_examples=60, deadline=None)
def test_packed_linear_is_linear(weight: Tensor, fmt: Format, biased: bool) -> None:
    rows, cols = weight.shape
    packed = PackedTensor.pack(weight, fmt, fit_grid(weight, fmt))
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(0))
    bias = torch.nn.Parameter(torch.ones(rows)) if biased else None
    expected = torch.nn.functional.linear(x, packed.dequantize(), bias).detach()
    found = PackedLinear(packed, bias, weight)(x).detach()
    scale = float((x.abs() @ packed.dequantize().abs().T).max())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)

"""What matrices in parts become: layers, products, memory and time."""

from __future__ import annotations

import copy
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitplan
from bitplan.kernels.latency import Device
from bitplan.kernels.packing import resident_bytes as laid_out
from bitplan.kernels.row_layouts import RowsLayout, prepare_rows
from bitplan.models.packed_rows import PackedRowsLinear
from bitplan.models.packing import replace
from bitplan.models.units import Ranges, UnitInfo, split_rows
from bitplan.quantizers.checkpoint import FILE_NAME, stored_rows, write_checkpoint
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.runtimes import Rules
from bitplan.search.limits import Limits
from bitplan.search.memory import resident_bytes
from bitplan.tests.fakes import fake_table


def table_units() -> tuple[UnitInfo, ...]:
    whole = UnitInfo("a.up", ("a.up",), ((320, 192),), "a.up")
    return (
        *split_rows(whole, [((0, 128), (256, 320)), ((128, 256),)]),
        UnitInfo("a.down", ("a.down",), ((192, 320),), "a.down"),
    )


def test_solved_plans_say_which_rows() -> None:
    table = fake_table(table_units(), ("int2-g64", "int4-g64"))
    found = bitplan.solve(table, "3bpw")
    assert found.row_ranges == {
        "a.up[rows:0]": ((0, 128), (256, 320)),
        "a.up[rows:1]": ((128, 256),),
    }
    with pytest.raises(ValueError, match="row_parts"):
        bitplan.solve(table, "3bpw", limits=Limits(rules=Rules.load("vllm")))


def test_memory_of_parts_is_at_least_what_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("BITPLAN_KERNEL", "triton")
    pytest.importorskip("triton")
    formats = ("int3-g64-asym", "int4-g64", "nf4-g64+lr4", "bf16")
    table = fake_table(table_units(), formats)
    held = resident_bytes(table, "nvidia")
    assert held[2, 0] == laid_out(Format.parse(formats[0]), (192, 320))
    rows = [torch.cat([torch.arange(128), torch.arange(256, 320)]), torch.arange(128, 256)]
    for chosen in ((0, 1), (2, 0), (1, 1), (3, 1)):
        parts = [
            (random_packed(formats[f], (len(some), 192)), some)
            for f, some in zip(chosen, rows, strict=True)
        ]
        layout = prepare_rows(parts, torch.device("cpu"))
        size = 4 * 320  # the order
        for one in getattr(layout, "layouts", [layout]):
            if hasattr(one, "pack"):
                size += one.pack.nbytes + sum(t.nbytes for t in one.low_rank or ())
            else:
                size += one.packed.nbytes
        if isinstance(layout, RowsLayout):
            size += sum(order.nbytes for order in (*layout.rows, layout.order))
        counted = held[0, chosen[0]] + held[1, chosen[1]]
        assert size <= counted < 1.11 * size
        if chosen == (0, 1):  # two classes, as it is counted; outputs and biases are in order
            assert counted == size + 2 * 4 * 320


def random_packed(spec: str, shape: tuple[int, int]) -> PackedTensor:
    weight, fmt = torch.randn(shape), Format.parse(spec)
    return PackedTensor.pack(weight, fmt, METHODS.trait("rtn", "grid")(weight, fmt))


def test_parts_that_are_multiplied_at_once_share_a_launch() -> None:
    formats = ("int3-g64-asym", "bf16")
    table, whole = fake_table(table_units(), formats), UnitInfo("a", ("a",), ((320, 192),), "a")
    for name, together in (("h100", True), ("cpu", False)):
        device = Device.load(name)
        limits = Limits(device=device)
        found = limits.milliseconds(table, table.kl > -1)[:2].sum(axis=0)
        one = limits.milliseconds(fake_table((whole,), formats), table.kl[:1] > -1)[0]
        launch = [1000 * device.overhead(Format.parse(fmt)) for fmt in formats]
        more = found - one
        assert (more[0] < launch[0] / 2) == together
        assert more[1] > launch[1] / 2, "plain numbers are a product of their own"


@st.composite
def in_parts(draw: st.DrawFn) -> tuple[Tensor, list[Ranges], list[str]]:
    """A weight [rows, cols], rows in up to four parts, and a format of each."""
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 130))
    owners = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    row_sets: dict[int, list[tuple[int, int]]] = {}
    for row, owner in enumerate(owners):
        ranges = row_sets.setdefault(owner, [])
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    names = ("int1-g32", "int3-g64-asym", "int8-gt", "nf4-g64", "int4-gc+lr2", "bf16", "q4_k")
    chosen = [draw(st.sampled_from(names)) for _ in row_sets]
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(len(owners) + cols))
    turned = draw(st.booleans())  # a part has its rows in the order of its ranges
    ranges_of = [tuple(reversed(r)) if turned else tuple(r) for r in row_sets.values()]
    return weight, ranges_of, chosen


@given(in_parts(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_any_parts_multiply_as_they_dequantize(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[Tensor, list[Ranges], list[str]],
    bias: bool,
    dtype: torch.dtype,
) -> None:
    weight, row_sets, formats = drawn
    rows, cols = weight.shape
    model = nn.Sequential(nn.Linear(cols, rows, bias=bias)).requires_grad_(False)
    expected, packed = torch.full_like(weight, torch.nan), {}
    for i, (ranges, spec) in enumerate(zip(row_sets, formats, strict=True)):
        indices = torch.cat([torch.arange(start, stop) for start, stop in ranges])
        fmt = Format.parse(spec)
        some = PackedTensor.pack(
            weight[indices], fmt, METHODS.trait("rtn", "grid")(weight[indices], fmt)
        )
        packed[f"0[rows:{i}]"] = some
        expected[indices] = some.dequantize()
    ranges_of = {f"0[rows:{i}]": ranges for i, ranges in enumerate(row_sets)}
    replace(model, packed, {}, ranges_of)
    layer, x = model.to(dtype)[0], torch.randn(3, cols).to(dtype)
    assert isinstance(layer, PackedRowsLinear)
    assert torch.equal(layer.rows(None, torch.float32), expected)
    some_rows = torch.randint(rows, (5,))
    assert torch.equal(layer.weight[some_rows], expected[some_rows].to(dtype))
    wanted = x.double() @ expected.double().T + (0 if layer.bias is None else layer.bias.double())
    error = (layer(x).double() - wanted).abs().max()
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert error <= bound * max(1.0, float(wanted.abs().max()))

    folder = tmp_path_factory.mktemp("file")
    write_checkpoint(folder, packed, {}, {}, ranges_of)
    content = (folder / FILE_NAME).read_bytes()
    size = sum(tensor.nbytes for tensor in packed.values())
    assert len(content) - 8 - struct.unpack("<Q", content[:8])[0] == size
    assert size == sum(t.fmt.stored_bytes(t.shape) for t in packed.values())
    assert stored_rows(folder) == ranges_of


def test_compiled_copied_and_differentiated() -> None:
    weight, rows = torch.randn(48, 64), [((0, 7), (20, 48)), ((7, 20),)]
    parts = []
    for ranges, spec in zip(rows, ("int4-g32", "int3-gc"), strict=True):
        indices = torch.cat([torch.arange(start, stop) for start, stop in ranges])
        parts.append((random_packed(spec, (len(indices), 64)), indices))
    layer = PackedRowsLinear(parts, nn.Parameter(torch.randn(48)), weight)
    dense, bias = layer.rows(None, torch.float32), layer.bias
    assert bias is not None
    x = torch.randn(3, 64, requires_grad=True)
    found = torch.autograd.grad(layer(x).square().sum(), [x, bias])
    wanted = torch.autograd.grad((x @ dense.T + bias).square().sum(), [x, bias])
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    torch._dynamo.reset()
    fresh = PackedRowsLinear(parts, bias, weight)
    compiled = torch.compile(fresh, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-4, rtol=1e-4)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x))
    half = layer.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.rows(None, torch.float32), dense), "what is stored is not cast"
    again.load_state_dict(layer.state_dict())

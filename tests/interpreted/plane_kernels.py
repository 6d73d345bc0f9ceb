"""The Triton kernels of plane packing against torch, in Triton's interpreter.

Run by ``unit/test_triton_numerics.py`` in a process of its own: the interpreter is chosen when
Triton is imported.  Without it the same cases run on a GPU.  Float32 results must agree to 1e-5,
float16 ones to 1e-3.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitplan.kernels import triton_launch, tune
from bitplan.kernels.blocks import Block, PlaneClass, ZeroKind
from bitplan.kernels.gemm import plane_linear
from bitplan.kernels.layouts import PlaneLayout
from bitplan.kernels.packing import PlanePack
from bitplan.kernels.planes import ORDERS, Order
from bitplan.kernels.triton_launch import (
    INTERPRETED,
    Extras,
    Launch,
    dequantize_blocks,
    multiply,
    multiply_dense,
)
from bitplan.models.packed_modules import PackedLinear
from bitplan.tests.packs import random_packed, relative_error

HALVES = (torch.float16, torch.bfloat16)
SHAPES = ((70, 200), (128, 128), (64, 192), (130, 64), (1, 33))
GROUPS = ("64", "128", "c", "32", "256", "t")


torch.set_default_device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def covering() -> list[tuple[str, tuple[int, int], Order, torch.dtype, ZeroKind, int]]:
    """Every width with both dtypes, orders, kinds of zeros; shapes and groups take turns."""
    cases = []
    for i, (bits, dtype, order) in enumerate(itertools.product(range(1, 9), HALVES, ORDERS)):
        group, shape = GROUPS[i % len(GROUPS)], SHAPES[(i + i // 4) % len(SHAPES)]
        asymmetric = "-asym" if (bits + ORDERS.index(order)) % 2 else ""
        zero: ZeroKind = "code" if i % 3 else "half"
        cases.append((f"int{bits}-g{group}{asymmetric}", shape, order, dtype, zero, 1 + i % 11))
    return cases


@pytest.mark.parametrize(("spec", "shape", "order", "dtype", "zero", "tokens"), covering())
def test_all_widths(
    spec: str,
    shape: tuple[int, int],
    order: Order,
    dtype: torch.dtype,
    zero: ZeroKind,
    tokens: int,
) -> None:
    packed = random_packed(spec, shape)
    pack = PlanePack.from_packed(packed, order, zero)
    x = torch.randn(tokens, shape[1]).to(dtype)
    expected = x.double() @ packed.dequantize().double().T
    launch = tune.rule(pack, tokens, 1)
    found = multiply(x, pack, None, Extras(), launch, torch.float32)
    assert relative_error(found, expected) < 1e-5
    blocks = pack.table.shape[0]
    assert torch.equal(dequantize_blocks(pack, 0, blocks, torch.float32), packed.dequantize())
    if blocks > 1:
        last = dequantize_blocks(pack, blocks - 1, blocks, torch.float32)
        assert torch.equal(last, packed.dequantize()[(blocks - 1) * pack.cell.rows :])


def mixed(order: Order = "nvidia") -> tuple[PlanePack, torch.Tensor]:
    """Four widths, three groups and both kinds of zeros in one matrix [205, 320]."""
    parts = [
        ("int3-g64-asym", (128, 192), (0, 0)),
        ("int4-gc", (128, 64), (0, 192)),
        ("int8-g32-asym", (128, 64), (0, 256)),
        ("int2-g128", (77, 320), (128, 0)),
    ]
    blocks, whole = [], torch.zeros(205, 320)
    for spec, (rows, cols), (row, col) in parts:
        packed = random_packed(spec, (rows, cols))
        whole[row : row + rows, col : col + cols] = packed.dequantize()
        blocks.append(Block.of(packed, row, col))
    return PlanePack.from_blocks(blocks, (205, 320), order), whole


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("splits", [1, 3])
def test_mixed_widths_and_splits(order: Order, dtype: torch.dtype, splits: int) -> None:
    pack, whole = mixed(order)
    x, bias = torch.randn(9, 320).to(dtype), torch.randn(205).to(dtype)
    expected = x.double() @ whole.double().T + bias.double()
    launch = Launch(8 if order == "nvidia" else 16, 2, 2, splits)
    found = multiply(x, pack, bias, Extras(), launch, torch.float32)
    assert relative_error(found, expected) < 1e-5
    again = multiply(x, pack, bias, Extras(), launch, torch.float32)
    assert torch.equal(found, again)


@pytest.mark.parametrize("tokens", [2, 65])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_arguments_of_any_stride(tokens: int) -> None:
    pack = PlanePack.from_packed(random_packed("int4-g64", (70, 128)))
    sparse = torch.eye(70, 128).to_sparse_csr()
    parts = (sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values().half())
    x, bias = torch.randn(128, tokens).half().T, torch.randn(70, 2).half()[:, 0]
    up, down = torch.randn(70, 16).half()[:, :4], torch.randn(128, 4).half().T
    assert not (x.is_contiguous() or bias.is_contiguous() or up.is_contiguous())
    dense = (x.contiguous(), pack, bias.contiguous(), parts, (up.contiguous(), down.contiguous()))
    assert torch.equal(plane_linear(x, pack, bias, parts, (up, down)), plane_linear(*dense))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("tokens", [3, 80])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_bias_sparse_rows_and_low_rank(dtype: torch.dtype, tokens: int) -> None:
    pack, whole = mixed()
    sparse = torch.zeros(205, 320)
    sparse[torch.randint(205, (90,)), torch.randint(320, (90,))] = torch.randn(90) / 8
    rows = sparse.half().float().to_sparse_csr()
    parts = (rows.crow_indices().int(), rows.col_indices().int(), rows.values().half())
    up, down = (torch.randn(205, 20) / 8).to(dtype), (torch.randn(20, 320) / 8).to(dtype)
    x, bias = torch.randn(tokens, 320).to(dtype), torch.randn(205).to(dtype)
    found = plane_linear(x, pack, bias, parts, (up, down))
    plain = whole.double() + sparse.half().double()
    through = (x @ down.T).double() @ up.double().T
    expected = x.double() @ plain.T + through + bias.double()
    # The interpreter cuts numbers off to bfloat16, up to three times here: 2^-7 of a number each.
    bound = {torch.float16: 1e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    assert relative_error(found, expected) < bound
    if dtype != torch.bfloat16:  # the control: each part counts
        for part in (x.double() @ sparse.half().double().T, through, bias.double()):
            assert relative_error(found, expected - part) > 5 * bound


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_table_of_values(dtype: torch.dtype, order: Order) -> None:
    """NF4-like codes: the table is rounded to the activations' dtype, nothing else is."""
    for bits in (4, 2):
        book = torch.linspace(-1, 1, 2**bits) ** 3
        codes = torch.randint(2**bits, (70, 200), dtype=torch.uint8)
        scale = torch.rand(70, 4).half()
        block = Block(0, 0, codes, scale, None, PlaneClass(bits, 64, "table"))
        pack = PlanePack.from_blocks([block], (70, 200), order, codebook=book)
        plain = book.to(dtype).double()[codes.long()]
        plain *= scale.double().repeat_interleave(64, 1)[:, :200]
        x = torch.randn(5, 200).to(dtype)
        expected = x.double() @ plain.T
        found = multiply(x, pack, None, Extras(), tune.rule(pack, 5, 1), torch.float32)
        assert relative_error(found, expected) < 1e-5
        dense = multiply_dense(x.float(), pack, None, Extras(), torch.float32)
        assert relative_error(dense, x.double() @ pack.dequantize().double().T) < 1e-3


@pytest.mark.parametrize("spec", ["int3-g64-asym", "int8-g128", "nf4-g64", "nl3-g64"])
def test_columns_in_the_order_that_the_other_compilers_take(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "WIDE", not triton_launch.WIDE)
    pack = PlanePack.from_packed(random_packed(spec, (70, 200)))
    for dtype in HALVES:
        x = torch.randn(19, 200).to(dtype)  # more tokens than one program of the sums has
        found = multiply(x, pack, None, Extras(), Launch(8, 2, 2, 3), torch.float32)
        bound = 1e-2 if spec.startswith("n") else 1e-5  # the table is rounded
        assert relative_error(found, x.double() @ pack.dequantize().double().T) < bound


def test_float16_results_and_odd_inputs() -> None:
    """Outputs rounded to float16; inputs that are not contiguous, not aligned, or a vector."""
    packed = random_packed("int4-g64-asym", (64, 192))
    pack = PlanePack.from_packed(packed)
    whole = torch.randn(2, 6, 196).half()
    for x in (whole[:, ::2, 1:193], whole[0, 0, :192], whole[..., 4:]):
        found = plane_linear(x, pack)
        assert found.shape == (*x.shape[:-1], 64) and found.dtype == torch.float16
        assert relative_error(found, x.double() @ packed.dequantize().double().T) < 1e-3


def test_long_rows_stay_accurate() -> None:
    """The offsets 1 and 16 of the codes must not drown a sum over thousands of columns."""
    for spec in ("int2-gc", "int4-g128-asym"):
        packed = random_packed(spec, (64, 2048))
        x = torch.randn(1, 2048).half() + 1  # a mean that the offsets multiply
        pack = PlanePack.from_packed(packed)
        found = multiply(x, pack, None, Extras(), Launch(8, 2, 1, 2), torch.float32)
        assert relative_error(found, x.double() @ packed.dequantize().double().T) < 1e-5


def test_tuning_measures_what_a_model_lets_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of the measured launches is kept and found again; others are not measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune._tuned.cache_clear()
    pack = PlanePack.from_packed(random_packed("int4-g128", (64, 512)))
    x = torch.randn(3, 512).half()
    by_rule = tune.choose_launch(x, pack)
    seen: list[float] = []

    def measure(call: object) -> float:
        launch = call.args[-1]  # type: ignore[attr-defined]
        assert relative_error(call(), x.double() @ pack.dequantize().double().T) < 1e-3  # type: ignore[operator]
        seen.append(launch.splits)
        return float(abs(launch.splits - 3))

    best, seconds = tune.tune(
        x, pack, lambda *, splits, STAGES, **_: abs(splits - 2) + STAGES, top=4, measure=measure
    )
    assert (best.splits, seconds) == (3, 0.0)
    assert 2 in seen and len(seen) == 5
    tune._tuned.cache_clear()
    assert tune.choose_launch(x, pack) == best
    assert tune.choose_launch(x.bfloat16(), pack) == by_rule
    next(tmp_path.glob("bitplan/launches-*.json")).write_text("{")
    tune._tuned.cache_clear()
    assert tune.choose_launch(x, pack) == by_rule


def test_packed_layers_run_on_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPLAN_KERNEL", "triton")
    packed, other = (random_packed("int3-g64-asym", (70, 128)) for _ in range(2))
    layer = PackedLinear(packed, None, torch.empty(0)).half()
    x = torch.randn(2, 128).half()
    assert relative_error(layer(x), x.double() @ packed.dequantize().double().T) < 1e-3
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    for name, part in layer.state_dict().items():  # what is saved stays what was stored
        assert torch.equal(part.cpu(), packed.tensors[name].cpu())
    layer.load_state_dict(dict(other.tensors))
    assert relative_error(layer(x), x.double() @ other.dequantize().double().T) < 1e-3


@pytest.mark.parametrize("spec", ["nf4-g64", "nf4-gc", "int3-g64-asym+lr4", "nf4-g32+lr20"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [3, 80])
def test_levels_and_corrections_run_on_planes(
    spec: str, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed layer of these formats takes the table and the low-rank path."""
    monkeypatch.setenv("BITPLAN_KERNEL", "triton")
    packed, bias = random_packed(spec, (70, 200)), torch.nn.Parameter(torch.randn(70).to(dtype))
    factors = {n: 16 * t for n, t in packed.tensors.items() if n in ("left", "right")}
    packed = replace(packed, tensors={**packed.tensors, **factors})
    layer = PackedLinear(packed, bias, torch.empty(0)).to(dtype)
    x = torch.randn(tokens, 200).to(dtype)
    found = layer(x)
    assert isinstance(layer._layout, PlaneLayout)
    assert (layer._layout.pack.codebook is None) == (packed.fmt.levels is None)
    assert (layer._layout.low_rank is None) == (packed.fmt.rank == 0)
    expected = x.double() @ packed.dequantize().double().T + bias.double()
    bound = {torch.float16: 1e-3, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(found, expected) < bound
    alone = x.double() @ packed.coded().dequantize().double().T + bias.double()
    if packed.fmt.rank and dtype == torch.float16:  # the control: the correction counts
        assert relative_error(found, alone) > 5 * bound

"""Matrices whose rows have several formats, in Triton's interpreter: one launch for each.

Run like ``plane_kernels.py``.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bitplan
from bitplan.jobs.materialize import assignment_formats, planned_units
from bitplan.kernels import triton_launch
from bitplan.kernels.layouts import PlaneLayout
from bitplan.kernels.row_layouts import RowsLayout
from bitplan.kernels.triton_kernels import plane_gemm
from bitplan.models.load import load_model
from bitplan.models.packed_rows import PackedRowsLinear
from bitplan.models.rendering import Renderer
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor
from bitplan.testing.llama import save_toy_llama
from bitplan.testing.plans import hand_made
from bitplan.tests.packs import random_packed, relative_error

HALVES = (torch.float16, torch.bfloat16)
BOUND = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-3}
DEVICE = "cpu" if triton_launch.INTERPRETED else "cuda"
UP = "model.layers.0.mlp.up_proj"


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.count += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    monkeypatch.setenv("BITPLAN_KERNEL", "triton")
    torch.manual_seed(0)
    counted = Counted(plane_gemm)
    monkeypatch.setattr(triton_launch, "plane_gemm", counted)
    yield counted


def layer_of(
    specs: list[str], rows: list[torch.Tensor], cols: int, dtype: torch.dtype
) -> tuple[PackedRowsLinear, torch.Tensor]:
    """A layer with a bias, and its dequantized weight in float64."""
    parts = []
    for spec, some in zip(specs, rows, strict=True):
        packed = random_packed(spec, (len(some), cols))
        if packed.fmt.layout != "codes":  # random bits may be no numbers
            weight = 0.02 * torch.randn(len(some), cols)
            grid = METHODS.trait("rtn", "grid")(weight, packed.fmt)
            packed = PackedTensor.pack(weight, packed.fmt, grid)
        parts.append((packed, some))
    whole = torch.empty(sum(map(len, rows)), cols, dtype=torch.float64)
    for packed, some in parts:
        whole[some] = packed.dequantize().double()
    bias = torch.nn.Parameter(torch.randn(len(whole)).to(dtype))
    layer = PackedRowsLinear(parts, bias, torch.empty(0)).to(dtype).to(DEVICE)
    return layer, whole.to(DEVICE)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_two_widths_are_one_launch(tokens: int, dtype: torch.dtype, launches: Counted) -> None:
    rows = [torch.cat([torch.arange(128), torch.arange(256, 320)]), torch.arange(128, 256)]
    layer, whole = layer_of(["int4-g64", "int3-g64"], rows, 192, dtype)
    x = torch.randn(tokens, 192, device=DEVICE).to(dtype)
    with torch.no_grad():
        found = layer(x)
    assert launches.count == 1
    assert isinstance(layer._layout, PlaneLayout)
    assert [kind.bits for kind in layer._layout.pack.classes] == [3, 4]
    assert layer.bias is not None
    assert relative_error(found, x.double() @ whole.T + layer.bias.detach().double()) < BOUND[dtype]
    assert torch.equal(layer._layout.pack.dequantize().double(), whole)
    assert torch.equal(layer.rows(None, torch.float32).double(), whole)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), found)


@pytest.mark.parametrize(
    ("specs", "launched"),
    [
        (["int4-g64-asym", "int3-gt", "nf4-gc"], 1),
        (["int2-g32+lr4", "int8-g64", "nf4-g64+lr8"], 1),
        (["int4-g64", "q4_k", "int3-g64-asym"], 1),
    ],
)
@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scattered_rows_of_any_formats(
    specs: list[str], launched: int, tokens: int, dtype: torch.dtype, launches: Counted
) -> None:
    """Rows in any order, row blocks with padding; 70 tokens are multiplied densely."""
    rows = list(torch.randperm(201).split([70, 30, 101]))
    layer, whole = layer_of(specs, [some.sort().values for some in rows], 96, dtype)
    x = torch.randn(tokens, 96, device=DEVICE).to(dtype)
    with torch.no_grad():
        found = layer(x)
    assert launches.count == (launched if tokens == 3 else 0)
    assert isinstance(layer._layout, RowsLayout if "q4_k" in specs else PlaneLayout)
    assert layer.bias is not None
    assert relative_error(found, x.double() @ whole.T + layer.bias.detach().double()) < BOUND[dtype]
    indices = torch.randint(201, (5,), device=DEVICE)
    assert torch.allclose(layer.rows(indices, torch.float32).double(), whole[indices])


def test_gradients(launches: Counted) -> None:
    rows = [torch.arange(0, 130, 2), torch.arange(1, 130, 2)]
    layer, whole = layer_of(["int4-g64", "int3-g64+lr2"], rows, 64, torch.float16)
    x = torch.randn(2, 64, device=DEVICE).half().requires_grad_()
    (found,) = torch.autograd.grad(layer(x).sum(), [x])
    assert relative_error(found, whole.sum(0).expand(2, -1)) < 1e-2


def test_a_plan_in_parts_runs_through_load(tmp_path: Path, launches: Counted) -> None:
    model = load_model(str(save_toy_llama(tmp_path / "toy", hidden=160, layers=1)), "cpu")
    row_sets = {f"{UP}[rows:0]": ((0, 128), (256, 320)), f"{UP}[rows:1]": ((128, 256),)}
    formats = {f"{UP}[rows:0]": "int4-g64", f"{UP}[rows:1]": "int3-g64"}
    plan = hand_made(model, formats, row_sets=row_sets)
    folder = bitplan.quantize(plan, tmp_path / "packed", model)
    ids = torch.arange(12)[None]
    renderer = Renderer(model.module, planned_units(model.module, plan))
    with torch.no_grad(), renderer.applied(assignment_formats(plan)):
        expected = model.logits(ids)
    loaded = bitplan.load(folder, DEVICE, torch.float16)
    with torch.no_grad():
        found = loaded(ids.to(DEVICE)).logits.cpu()
    assert launches.count == 1
    assert relative_error(found, expected) < 1e-2
    again = copy.deepcopy(loaded)
    with torch.no_grad():
        assert torch.equal(again(ids.to(DEVICE)).logits.cpu(), found)
    assert launches.count == 2

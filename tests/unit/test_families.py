"""NormalFloat and low-rank corrections: the papers' numbers, and a plan of them from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitplan
from bitplan.exporters.checks import nearest_format
from bitplan.exporters.export import export
from bitplan.jobs.materialize import load_packed
from bitplan.kernels.layouts import CorrectedLayout, CpuLayout, DenseLayout, StoredLayout
from bitplan.models.load import load_model
from bitplan.models.packed_modules import PackedLinear
from bitplan.models.samples import calibration_samples
from bitplan.models.units import UnitInfo
from bitplan.quantizers import runtimes
from bitplan.quantizers.families.low_rank import Corrected
from bitplan.quantizers.families.nf4 import levels
from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import Grid, encode, render
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.runtimes import Rules

rtn = METHODS.trait("rtn", "grid")
NEW = ("nf4-g64", "int3-g32+lr2", "int2-g64-asym+lr4")
# Table of the levels in appendix E of the paper on QLoRA.
PUBLISHED = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) / 50


def test_the_levels_are_those_of_the_paper() -> None:
    assert levels() == pytest.approx(PUBLISHED, abs=2e-6)
    assert levels()[0] == -1 and levels()[-1] == 1
    assert len(levels(3)) == 8 and 0 in levels(3) and list(levels(3)) == sorted(levels(3))


def test_codes_are_the_nearest_levels() -> None:
    fmt, weight = Format.parse("nf4-g64"), normal(8, 200)
    grid = rtn(weight, fmt)
    assert isinstance(grid, Grid)
    table = torch.tensor(levels())
    scale = grid.scale.float().repeat_interleave(64, 1)[:, :200]
    distance = (weight[..., None] / scale[..., None] - table).abs()
    found = distance.gather(2, encode(weight, fmt, grid).long()[..., None])[..., 0]
    assert torch.allclose(found, distance.amin(2), atol=1e-6)
    assert (grid.scale.float()[:, 0] / weight[:, :64].abs().amax(1) - 1).abs().max() < 2**-10


def test_normal_levels_suit_normal_weights() -> None:
    """The control of the table: even levels with the same scales lose more."""
    weight, fmt = normal(64, 1024), Format.parse("nf4-g64")
    error = (render(weight, fmt, rtn(weight, fmt)) - weight).square().mean()
    largest = weight.view(64, -1, 64).abs().amax(2, keepdim=True)
    even = (weight.view(64, -1, 64) / largest * 7).round() / 7 * largest
    assert error < 0.85 * (even.view(64, -1) - weight).square().mean()


@pytest.mark.parametrize(("rows", "cols", "rank"), [(96, 256, 8), (300, 120, 16), (5, 80, 4)])
def test_the_correction_is_nearly_the_best_of_its_rank(rows: int, cols: int, rank: int) -> None:
    weight, fmt = normal(rows, cols), Format.parse(f"int2-g32+lr{rank}")
    assert fmt.base is not None
    error = weight - render(weight, fmt.base, rtn(weight, fmt.base))
    left = weight - render(weight, fmt, rtn(weight, fmt))
    values = torch.linalg.svdvals(error)
    best = float(values[rank:].square().sum())
    assert best < float(left.square().sum()) < best + 0.03 * float(values[:rank].square().sum())


def test_a_correction_of_full_rank_gives_everything_back() -> None:
    weight, fmt = normal(6, 64), Format.parse("int2-g32+lr64")
    assert fmt.tensors((6, 64))["left"] == ((6, 6), "float16")
    assert (render(weight, fmt, rtn(weight, fmt)) - weight).abs().max() < 1e-3 * weight.abs().max()


def test_what_was_stored_renders_the_same() -> None:
    weight, fmt = normal(40, 200), Format.parse("int4-g64-asym+lr3")
    fitted = rtn(weight, fmt)
    kept = PackedTensor.pack(weight, fmt, fitted).fitted()
    assert isinstance(fitted, Corrected) and isinstance(kept, Corrected)
    assert torch.equal(fitted.left, kept.left) and torch.equal(fitted.right, kept.right)
    assert torch.equal(render(weight, fmt, fitted), render(weight, fmt, kept))
    with pytest.raises(ValueError, match="not made of codes alone"):
        PackedTensor.of_codes(torch.zeros(40, 200, dtype=torch.uint8), fmt, fitted.grid)


@pytest.mark.parametrize("spec", ["nf4-g64", "int3-gc+lr2", "nf4-g32+lr2"])
def test_what_does_not_fit_is_refused(spec: str) -> None:
    weight = torch.ones(4, 64)
    with pytest.raises(ValueError, match=rf"does not fit {spec[:3]}.*bf16 or fp32"):
        rtn(weight * 1e7, Format.parse(spec))
    with pytest.raises(ValueError, match="contains nan"):
        rtn(weight * torch.nan, Format.parse(spec))


@pytest.mark.parametrize("spec", NEW)
@pytest.mark.parametrize("runtime", runtimes.names())
def test_runtimes_refuse_them_and_name_something_else(spec: str, runtime: str) -> None:
    rules, fmt = Rules.load(runtime), Format.parse(spec)
    name = "model.layers.0.mlp.up_proj"
    reason = rules.refusal(fmt, (512, 512), name)
    assert reason is not None and reason.startswith("families: ") and spec in reason
    better = nearest_format(UnitInfo(name, (name,), ((512, 512),), "up_proj", 0, ()), fmt, rules)
    assert better is not None and better.bits >= fmt.bits


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [*NEW, "nf4-gc+lr3"])
def test_layers_on_a_cpu(
    spec: str, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPLAN_KERNEL", kernel)
    weight, fmt = normal(70, 200), Format.parse(spec)
    packed = PackedTensor.pack(weight, fmt, rtn(weight, fmt))
    bias = torch.nn.Parameter(torch.randn(70).to(dtype))
    layer = PackedLinear(packed, bias, weight.to(dtype))
    x = torch.randn(3, 200).to(dtype).requires_grad_()
    expected = x.double() @ packed.dequantize().double().T + bias.double()
    found = layer(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(gradient.float(), packed.dequantize().sum(0), atol=2e-2)
    kinds = (CorrectedLayout,) if fmt.rank else (CpuLayout, DenseLayout)
    assert isinstance(layer._layout, kinds if kernel == "cpu" else StoredLayout)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert (compiled(x) - found).abs().max() < tolerance * expected.abs().max()


def test_a_plan_of_them_is_made_written_loaded_and_run(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_folder), "cpu")
    samples = calibration_samples(model, sequences=8, length=32)
    table = bitplan.profile(model, samples, (*NEW, "int4-g64", "keep"))
    pins = {"*q_proj": "nf4-g64", "*up_proj": "int3-g32+lr2", "*down_proj": "int2-g64-asym+lr4"}
    plan = bitplan.solve(table, "9bpw", pins=pins)
    assert {*NEW} <= {*plan.assignments.values()}
    folder = bitplan.quantize(plan, tmp_path / "packed")
    packed, applied = load_packed(folder), load_model(str(tiny_folder), "cpu")
    bitplan.apply(applied.module, plan)
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(packed.logits(ids), applied.logits(ids), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="families: it takes"):
        export(plan, "vllm", tmp_path / "vllm", model=model)


def test_codes_for_normal_weights_from_profile_to_packed_folder(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Rounded under the curvature, priced, written, rounded again and run."""
    model = load_model(str(tiny_folder), "cpu")
    samples = calibration_samples(model, sequences=8, length=32)
    table = bitplan.profile(
        model, samples, ("nl3-g64", "vq2-g64", "tcq2", "tcq3", "int8-g64"), rounding="fisher_gptq"
    )
    assert (table.kl[:, 3] < table.kl[:, 2]).all()
    pins = {"*q_proj": "tcq3", "*up_proj": "vq2-g64", "*down_proj": "nl3-g64", "*o_proj": "tcq2"}
    plan = bitplan.solve(table, "5bpw", pins=pins)
    assert {*pins.values()} <= {*plan.assignments.values()}
    folder = bitplan.quantize(plan, tmp_path / "packed", batches=samples)
    packed, applied = load_packed(folder), load_model(str(tiny_folder), "cpu")
    bitplan.apply(applied.module, plan, samples)
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(packed.logits(ids), applied.logits(ids), atol=1e-4, rtol=1e-4)

"""Exported models in the foreign tools: logits against ours, for every format of the rules."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitplan.exporters.export import export
from bitplan.exporters.layouts.onnx_modules import QuantizedLinear
from bitplan.exporters.targets import EXPORTERS
from bitplan.models.find import find_units
from bitplan.models.measure import Run
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods.rtn import fit_grid
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.runtimes import Rules
from bitplan.testing.plans import hand_made, mixed

# Target, its runtime, the largest relative error of the logits. Zero: equal bit for bit.
FOLDERS = [
    ("compressed_tensors", "transformers", 0.0),
    ("mlx", "mlx", 1e-5),
    ("autoround", "autoround", 2e-3),  # these two compute in float16
    ("gptq", "gptq", 2e-3),
]
IDS = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(1))


def needs(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"needs {module}")


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((theirs - ours).norm() / ours.norm())


def integer_formats(runtime: str) -> list[str]:
    return [fmt.name for fmt in Rules.load(runtime).all_formats() if fmt.integer]


def matrices(model: LoadedModel, runtime: str) -> list[str]:
    rules = Rules.load(runtime)
    return [unit.name for unit in find_units(model.module) if not rules.must_stay_float(unit.name)]


@pytest.mark.parametrize(("name", "runtime", "most"), FOLDERS)
def test_every_format_of_the_rules_runs(
    name: str, runtime: str, most: float, wide: LoadedModel, tmp_path: Path
) -> None:
    exporter = EXPORTERS.get(name)()
    needs(str(exporter.module))
    names = matrices(wide, runtime)
    offered = ["bf16", *integer_formats(runtime)]
    for i in range(0, len(offered), len(names)):
        formats = offered[i : i + len(names)]
        plan = hand_made(wide, dict(zip(names, cycle(formats), strict=False)))
        done = export(plan, name, tmp_path / str(i), runtime=runtime, model=wide)
        ours, theirs = done.source.logits(IDS), exporter.logits(done.path)(IDS)
        assert error(ours, theirs) <= most, formats


@pytest.mark.parametrize(("name", "runtime", "most"), FOLDERS)
def test_two_swapped_scales_are_seen_in_the_logits(
    name: str, runtime: str, most: float, wide: LoadedModel, tmp_path: Path
) -> None:
    exporter = EXPORTERS.get(name)()
    needs(str(exporter.module))
    fmt = integer_formats(runtime)[0]
    plan = hand_made(wide, dict.fromkeys(matrices(wide, runtime), fmt))
    done = export(plan, name, tmp_path / "out", runtime=runtime, model=wide)
    file = done.path / "model.safetensors"
    tensors = load_file(file)
    scale = next(n for n in tensors if n.endswith(("down_proj.weight_scale", "down_proj.scales")))
    flat = tensors[scale].view(-1)
    low, high = int(flat.float().argmin()), int(flat.float().argmax())
    flat[[low, high]] = flat[[high, low]]
    save_file(tensors, file, {"format": "pt"})
    wrong = exporter.logits(done.path)(IDS)
    file.unlink()
    right = export(plan, name, tmp_path / "right", runtime=runtime, model=wide)
    assert error(exporter.logits(right.path)(IDS), wrong) > 1e-5


@pytest.mark.parametrize(("name", "runtime", "most"), FOLDERS)
def test_a_folder_of_several_files_runs(
    name: str,
    runtime: str,
    most: float,
    wide: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = EXPORTERS.get(name)()
    needs(str(exporter.module))
    monkeypatch.setattr("bitplan.exporters.configs.folder.SHARD", 200_000)
    plan = mixed(wide, Rules.load(runtime))
    done = export(plan, name, tmp_path / "out", model=wide)
    assert len(list(done.path.glob("*.safetensors"))) > 3
    assert error(done.source.logits(IDS), exporter.logits(done.path)(IDS)) <= most


class Branch(nn.Module):
    """A convolution with groups, its normalization, and a linear layer on the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.normalization = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 10)
        self.normalization.running_var = torch.rand(16) + 0.5
        self.normalization.running_mean = torch.randn(16)
        nn.init.normal_(self.normalization.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.normalization(self.convolution(x)))
        logits: Tensor = self.linear(y.mean((2, 3)))
        return logits


class Branches(nn.Module):
    """One logit vector per branch, so that an error in one format is not lost among the others."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.branches = nn.ModuleList(Branch() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return torch.stack([branch(y) for branch in self.branches], 1)


def convolutional(branches: int) -> LoadedModel:
    torch.manual_seed(0)
    module = Branches(branches).eval().requires_grad_(False)
    images = torch.randn(1, 3, 12, 12)
    return LoadedModel("cnn", module, "float32", Workload(module, calibration=[images]))


def worst_branch(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative error of a branch: logits are [samples, branches, classes]."""
    return float(((theirs - ours).norm(dim=(0, 2)) / ours.norm(dim=(0, 2))).max())


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A CNN with every format of the rules in a convolution and in a linear layer."""
    needs("onnxscript")
    formats = [*integer_formats("onnx"), "bf16", "fp16"]
    model = convolutional(len(formats))
    names = [unit.name for unit in find_units(model.module)]
    chosen = dict(zip(names[1::2], formats, strict=True))
    chosen |= dict(zip(names[2::2], formats, strict=True))
    out = tmp_path_factory.mktemp("graph") / "out"
    done = export(hand_made(model, chosen), "onnx", out, model=model)
    return done.path, done.source.logits


def test_every_format_runs_in_onnx_runtime(graph: tuple[Path, Run]) -> None:
    needs("onnxruntime")
    images = torch.randn(3, 3, 12, 12)  # not the number of the example: the batch is open
    path, ours = graph
    assert worst_branch(ours(images), EXPORTERS.get("onnx")().logits(path)(images)) < 1e-5


def test_every_format_runs_in_openvino(graph: tuple[Path, Run]) -> None:
    needs("openvino")
    images = torch.randn(3, 3, 12, 12)
    path, ours = graph
    assert worst_branch(ours(images), EXPORTERS.get("openvino")().logits(path)(images)) < 1e-5


def test_the_graph_keeps_no_dense_copy_and_no_path_of_this_machine(
    graph: tuple[Path, Run],
) -> None:
    import onnx_ir

    path, _ = graph
    model = onnx_ir.load(path / "model.onnx")
    kept = {value.dtype.name for value in model.graph.initializers.values()}
    assert {"UINT4", "INT4", "INT8", "UINT8", "FLOAT16"} <= kept
    dense = [
        name
        for name, value in model.graph.initializers.items()
        if value.dtype.name == "FLOAT" and value.const_value.size >= 256 and ".weight" in name
    ]
    assert dense == ["module.stem.weight"]  # the plan leaves it as it was
    assert str(Path(__file__).parents[2]).encode() not in (path / "model.onnx").read_bytes()


def test_output_channels_with_formats_of_their_own_run(tmp_path: Path) -> None:
    needs("onnxscript")
    needs("onnxruntime")
    import onnx_ir

    from bitplan.exporters.layouts.onnx_graph import build

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    blocks = []
    for spec, rows in (("int4-g32", slice(0, 20)), ("int8-g64-asym", slice(20, 32))):
        fmt = Format.parse(spec)
        blocks.append(PackedTensor.pack(weight[rows], fmt, fit_grid(weight[rows], fmt)))
    module = nn.Sequential(QuantizedLinear("0", blocks, None)).eval()
    x = torch.randn(3, 64, generator=generator)
    onnx_ir.save(
        build(LoadedModel("rows", module, "float32", Workload(module, calibration=[x])), module),
        tmp_path / "model.onnx",
    )
    ours = (x @ torch.cat([block.dequantize() for block in blocks]).T)[:, None]
    assert error(ours, EXPORTERS.get("onnx")().logits(tmp_path)(x)) < 1e-5
    if find_spec("openvino"):
        assert error(ours, EXPORTERS.get("openvino")().logits(tmp_path)(x)) < 1e-5


def test_a_vision_transformer_runs_in_both(tmp_path: Path) -> None:
    needs("onnxscript")
    needs("onnxruntime")
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    config.num_labels = 7
    module = ViTForImageClassification(config).eval().requires_grad_(False)
    images = torch.randn(5, 3, 16, 16)
    model = LoadedModel("vit", module, "float32", Workload(module, calibration=[images[:2]]))
    formats = ["int8-gc", "int4-gc-asym", "int4-g32-asym", "int8-g64", "int2-g32-asym"]
    odd = ["*cls_token", "*position_embeddings"]  # of which the export has no quantized form
    names = [unit.name for unit in find_units(module, exclude=odd)]  # patches first, then layers
    plan = hand_made(model, dict(zip(names, cycle(formats), strict=False)), "onnx")
    done = export(plan, "onnx", tmp_path / "out", model=model)
    ours = done.source.logits(images)
    assert error(module(images).logits[:, None], ours) > 1e-3  # it is the plan that is compared
    assert error(ours, EXPORTERS.get("onnx")().logits(done.path)(images)) < 1e-5
    if find_spec("openvino"):
        assert error(ours, EXPORTERS.get("openvino")().logits(done.path)(images)) < 1e-5


def test_swapped_scales_are_seen_in_onnx_runtime(graph: tuple[Path, Run], tmp_path: Path) -> None:
    needs("onnxruntime")
    import numpy as np
    import onnx_ir

    path, ours = graph
    model = onnx_ir.load(path / "model.onnx")
    name = next(n for n in model.graph.initializers if n.endswith(".scales.half"))
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    value.const_value = onnx_ir.Tensor(np.flip(array, 0).copy(), name=name)
    onnx_ir.save(model, tmp_path / "model.onnx")
    images = torch.randn(3, 3, 12, 12)
    assert worst_branch(ours(images), EXPORTERS.get("onnx")().logits(tmp_path)(images)) > 1e-3


def test_a_language_model_runs_in_both(wide: LoadedModel, tmp_path: Path) -> None:
    needs("onnxscript")
    needs("onnxruntime")
    names = matrices(wide, "onnx")
    formats = ["int4-g32-asym", "int8-g64", "int2-g128-asym", "int4-gc-asym", "bf16"]
    chosen = dict(zip(names, islice(cycle(formats), len(names)), strict=True))
    done = export(hand_made(wide, chosen), "onnx", tmp_path / "out", model=wide)
    ours = done.source.logits(IDS)
    assert error(ours, EXPORTERS.get("onnx")().logits(done.path)(IDS)) < 1e-5
    assert done.stored and done.size < done.stored + 1.1 * 4 * 512 * 256 + 1e6
    if find_spec("openvino"):
        assert error(ours, EXPORTERS.get("openvino")().logits(done.path)(IDS)) < 1e-5

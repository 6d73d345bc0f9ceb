"""Models and files that do not fit the streaming of weights are noticed."""

from __future__ import annotations

import gc
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitplan.models import load, mapped, streamed, together
from bitplan.models.blockwise import BlockwisePass
from bitplan.models.borders import Borders
from bitplan.models.find import find_units
from bitplan.models.identity import state_sha256
from bitplan.models.load import load_model
from bitplan.models.mapped import MappedFile, Spill, is_mapped
from bitplan.models.measure import measure, plan_runner
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, samples_from_batches
from bitplan.models.streamed import is_streamed, read_again
from bitplan.models.together import measure_together
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.sensitivity.factors import Gradient
from bitplan.sensitivity.reading import UsesReader
from tests.folders import save_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path, wide_folder: Path) -> Path:
    return save_model("gpt2", wide_folder, tmp_path / "gpt2")


def in_files(folder: Path) -> nn.Module:
    module = load_model(str(folder), "cpu", 1).module
    assert is_streamed(module)
    return module


class Reading(nn.Module):
    """Block of a model in which a later block reads what an earlier one has left."""

    def __init__(self, number: int, how: str) -> None:
        super().__init__()
        self.linear, self.number, self.how = nn.Linear(16, 16), number, how
        self.cut = False

    def forward(self, hidden: Tensor, parent: Any, values: dict[str, Tensor]) -> Tensor:
        changed: Tensor = hidden + self.linear(hidden).tanh()
        if self.cut:
            changed = changed.detach()
        if self.number == 4:
            parent[0].left = values["left"] = changed.mean(1, keepdim=True)
        if self.number == 5 and self.how != "nothing":
            left = values["left"] if self.how == "values" else parent[0].left
            left = left.detach() if self.how == "constant" else left
            changed = changed + left.tanh()
        return changed


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24)
        self.layers = nn.ModuleList(Reading(i, how) for i in range(7))
        self.left: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        hidden, values = self.embed(ids), dict[str, Tensor]()
        for layer in self.layers:
            hidden = layer(hidden, [self], values)
        logits: Tensor = self.head(hidden)
        return logits


def toy(how: str, batches: int) -> tuple[LoadedModel, Samples, Renderer]:
    torch.manual_seed(0)
    module = Model(how).requires_grad_(False).eval()
    model = LoadedModel("toy", module, "float32", Workload(module))
    ids = torch.randint(0, 24, (batches, 6)).split(1)
    samples = samples_from_batches(list(ids), model, "toy", 0)
    return model, samples, Renderer(module, find_units(module))


def blockwise(model: LoadedModel, samples: Samples, renderer: Renderer) -> BlockwisePass[Gradient]:
    reader = UsesReader(model, renderer, samples)
    return BlockwisePass(model, renderer, find_units(model.module), samples, reader, limit=0)


@pytest.mark.parametrize("batches", [3, 1])
@pytest.mark.parametrize("how", ["nothing", "attribute", "constant", "values"])
def test_what_a_block_reads_of_an_earlier_one_is_noticed(how: str, batches: int) -> None:
    model, samples, renderer = toy(how, batches)
    plan = dict.fromkeys(renderer.names, Format.parse("int2-g32"))
    expected, _ = measure(model, {"plan": plan_runner(model, renderer, plan)}, samples)
    found, _ = measure_together(model, {"plan": (renderer, plan)}, samples)
    assert np.allclose(found["plan"].kl, expected["plan"].kl, rtol=1e-5)
    prefix = together._prefix(model, {"plan": (renderer, plan)}, samples)
    assert len(prefix.blocks) == (7 if how == "nothing" else 0)


@pytest.mark.parametrize("how", ["attribute", "constant", "values"])
def test_a_model_that_cannot_be_run_by_blocks_is_gone_through_as_a_whole(how: str) -> None:
    model, samples, renderer = toy(how, 3)
    setattr(model.module, streamed._STREAMED, True)
    passes = blockwise(model, samples, renderer)
    with pytest.warns(UserWarning, match="is gone through as a whole, and its files are read once"):
        assert not passes.is_blockwise
    inputs: dict[str, list[Tensor]] = {"layers.6.linear": []}
    found = passes.forward(lambda seen: inputs.setdefault(seen.name, []).append(seen.x))
    assert found.tolist() == [6, 6, 6]
    hidden = []
    handle = model.module.get_submodule("layers.6.linear").register_forward_hook(
        lambda _, args, __: hidden.append(args[0])
    )
    for batch in samples.batches:
        model.logits(batch)
    handle.remove()
    assert torch.equal(
        torch.cat([x.flatten(0, -2) for x in hidden]),
        torch.cat([x.reshape(-1, 16) for x in inputs["layers.6.linear"]]),
    )


def test_a_state_is_put_in_place_of_all_of_another() -> None:
    kept, state = Borders(limit=0), torch.arange(8.0)
    kept.put(0, (state, None))
    kept.put(0, state)
    assert kept.get(0)[1] is None, "a tensor, and no tuple"
    kept.drop(0)
    assert 0 not in kept
    kept.put(0, state + 1)
    assert 0 in kept and torch.equal(kept.get(0)[0], state + 1) and kept._end == state.nbytes


def test_below_a_block_that_does_not_read_its_input_gradients_are_zero() -> None:
    model, samples, renderer = toy("nothing", 2)
    passes = blockwise(model, samples, renderer)
    assert passes.is_blockwise
    block = model.module.get_submodule("layers.3")
    assert isinstance(block, Reading)
    block.cut = True  # not when it was tried out
    sizes: dict[str, float] = {}

    def visit(name: str, gradient: Gradient, _: range) -> None:
        if name.startswith("layers."):
            sizes[name] = sizes.get(name, 0) + float(gradient.gradient(slice(None)).abs().sum())

    passes.backward((lambda logits, _: torch.randn_like(logits), visit))
    assert sizes["layers.4.linear"] > 0
    assert not any(sizes.get(f"layers.{i}.linear") for i in range(4))


def test_a_model_that_fails_is_not_taken_to_run_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples, renderer = toy("nothing", 2)
    passes = blockwise(model, samples, renderer)

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("it fails")

    monkeypatch.setattr(passes._reader, "stream", fail)
    assert not passes.is_blockwise


def test_the_kept_hash_is_that_of_what_is_in_memory_too(folder: Path, cache: Path) -> None:
    module = in_files(folder)
    module.get_submodule("transformer.ln_f").get_parameter("weight").data.mul_(2)
    changed = state_sha256(module)
    pristine = state_sha256(in_files(folder))
    assert changed != pristine
    assert pristine == state_sha256(load_model(str(folder), "cpu", 1 << 50).module)
    assert len(list((cache / "bitplan" / "hashes").iterdir())) == 2


def test_other_bytes_of_the_same_time_have_another_hash(folder: Path) -> None:
    path = folder / "model.safetensors"
    before, about = state_sha256(in_files(folder)), path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert state_sha256(in_files(folder)) != before


def test_weights_are_looked_at_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = in_files(folder)
    sizes: list[int] = []
    original = Tensor.sum

    def count(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        sizes.append(tensor.numel())
        return original(tensor, *args, **options)

    monkeypatch.setattr(load, "_PART", 100)
    monkeypatch.setattr(Tensor, "sum", count)
    load._check_finite(module)
    assert max(sizes) == 100 and sum(sizes) == sum(p.numel() for p in module.parameters())
    norm = module.get_submodule("transformer.ln_f").get_parameter("weight")
    norm.data[-1] = torch.nan
    with pytest.raises(ValueError, match=r"'transformer.ln_f.weight' has 1 NaN"):
        load._check_finite(module)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError])
def test_whatever_transformers_raises_the_model_is_loaded_whole(
    error: type[Exception], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> nn.Module:
        raise error("it fails")

    monkeypatch.setattr(load, "streamed_model", fail)
    with pytest.warns(UserWarning, match=f"loaded whole, .*: {error.__name__}: it fails"):
        assert not is_streamed(load_model(str(folder), "cpu", 1).module)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"shape": [3], "data_offsets": [0, 8]}, "cannot be bytes 0 to 8"),
        ({"shape": [2], "data_offsets": [-4, 4]}, "cannot be bytes -4 to 4"),
        ({"shape": [-1, -2], "data_offsets": [0, 8]}, "cannot be bytes"),
        ({"shape": [2], "data_offsets": [8, 0]}, "cannot be bytes"),
        ({"shape": [2], "data_offsets": [8, 16]}, "truncated"),
        ({"shape": [2], "data_offsets": 8}, "TypeError"),
        ({"data_offsets": [0, 8]}, "KeyError"),
        (3, "TypeError"),
    ],
)
def test_damaged_headers_are_refused(about: Any, said: str, tmp_path: Path) -> None:
    entry = {"dtype": "F32"} | about if isinstance(about, dict) else about
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=said):
        MappedFile(path)


@pytest.mark.parametrize("size", [1 << 62, 30, 3])
def test_a_header_of_no_such_size_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"[1]" + bytes(8))
    with pytest.raises(ValueError, match="cannot be mapped"):
        MappedFile(path)


def test_a_file_of_empty_tensors_is_mapped(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    spill.put("nothing", torch.empty(0, 3))
    assert spill.tensors()["nothing"].shape == (0, 3)


def test_norms_of_a_float32_checkpoint_are_in_memory(folder: Path) -> None:
    load_model(str(folder), "cpu", 1 << 50).module.save_pretrained(folder)  # type: ignore[operator]
    module = in_files(folder)
    norm = module.get_submodule("transformer.ln_f").get_parameter("weight")
    matrix = module.get_submodule("transformer.wte")._parameters["weight"]
    assert matrix is not None and matrix.dtype == torch.float32
    assert is_mapped(matrix) and not is_mapped(norm)
    norm.data.zero_()
    mapped.release(norm)
    assert not norm.any()


def test_nothing_keeps_the_files_of_a_model_that_is_gone(folder: Path) -> None:
    gc.collect()  # models of other tests
    before = set(mapped._maps)
    module = in_files(folder)
    assert set(mapped._maps) > before
    with torch.enable_grad():
        module(torch.arange(8)[None])
        with read_again(module):
            module(torch.arange(8)[None])
    module(torch.arange(8)[None])
    assert streamed._now.last is None
    del module
    gc.collect()
    assert not set(mapped._maps) - before

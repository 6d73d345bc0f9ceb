"""The bytes that a runtime's rules count are those that are written, for any shape and format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.exporters.export import check_written, export
from bitplan.exporters.layouts import packing
from bitplan.exporters.targets import find
from bitplan.models.find import find_units
from bitplan.models.identity import state_sha256
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers import runtimes as rules
from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.runtimes import Rules, byte_count
from bitplan.search.limits import Limits
from bitplan.search.solve import solve
from bitplan.sensitivity.provenance import ModelRef
from bitplan.testing.plans import hand_made, mixed
from bitplan.tests.fakes import fake_table
from bitplan.tests.gguf_toys import write_llama_gguf
from bitplan.tests.packs import random_packed

SEEDS = st.integers(0, 2**32 - 1)
PACKERS: dict[str, Callable[[PackedTensor], packing.Tensors]] = {
    "transformers": packing.to_compressed_tensors,
    "vllm": packing.to_compressed_tensors,
    "vllm-cpu": packing.to_compressed_tensors,
    "autoround": lambda packed: packing.to_gptq(packed, offset_zeros=False),
    "gptq": lambda packed: packing.to_gptq(packed, offset_zeros=False),
    "mlx": packing.to_mlx,
    "onnx": packing.to_matmul_nbits,
}
WRITTEN = [*PACKERS, "llama.cpp"]


def integers(found: Rules) -> list[Format]:
    return [fmt for fmt in found.all_formats() if fmt.integer]


def test_every_runtime_with_a_layout_of_its_own_is_tested() -> None:
    assert {name for name in rules.names() if Rules.load(name).storage} == PACKERS.keys()


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=60)
@given(st.data())
def test_every_tensor_has_the_bytes_that_the_rules_say(name: str, data: st.DataObject) -> None:
    found = Rules.load(name)
    sizes = st.integers(1, 300) if name == "onnx" else st.integers(1, 12).map(lambda n: 32 * n)
    shape = data.draw(st.tuples(sizes, sizes))
    offered = [
        fmt
        for fmt in integers(found)
        if not found.refusal(fmt, shape, "up") and (name != "onnx" or fmt.group_size > 0)
    ]
    assume(offered)
    fmt = data.draw(st.sampled_from(offered))
    tensors = PACKERS[name](packed_weight(fmt, shape))
    if name == "autoround":
        del tensors["g_idx"]
    said = {stored.tensor: 0 for stored in found.storage}
    for stored in found.storage:
        said[stored.tensor] += stored.nbytes(fmt, shape)
    assert {k: v for k, v in said.items() if v} == {k: t.nbytes for k, t in tensors.items()}


def packed_weight(fmt: Format, shape: tuple[int, int]) -> PackedTensor:
    """Random codes; scales of a size that any layout holds."""
    packed = random_packed(fmt.name, shape)
    scale = torch.full_like(packed.tensors["scale"], 2**-6)
    return PackedTensor(fmt, shape, {**packed.tensors, "scale": scale})


def random_llama(generator: np.random.Generator) -> LoadedModel:
    torch.manual_seed(int(generator.integers(1000)))
    heads, head = int(generator.choice([2, 3, 4])), 32 * int(generator.integers(1, 4))
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=heads * head,
        intermediate_size=32 * int(generator.integers(1, 12)),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=int(generator.choice([1, heads])),
        tie_word_embeddings=bool(generator.integers(2)),
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel("random", module, "float32", Workload(module))


@pytest.mark.parametrize("name", [n for n in WRITTEN if n != "onnx"])
@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_a_written_file_takes_what_the_plan_says(
    name: str, seed: int, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("written")
    model, found = random_llama(generator), Rules.load(name)
    formats = [fmt.name for fmt in found.all_formats()]
    plan = mixed(model, found, list(generator.permutation(formats)))
    assume(not all(Format.parse(fmt).floating for fmt in plan.assignments.values()))
    like = None
    if name == "llama.cpp":
        like = write_llama_gguf(model, tiny_folder, folder / "like.gguf")
    out = folder / ("out.gguf" if like else "out")
    done = export(plan, name, out, like=like, model=model)
    assert done.stored == plan.bytes


class Several(nn.Module):
    """Convolutions and linear layers of any shape, side by side on the same input."""

    def __init__(self, generator: np.random.Generator, count: int) -> None:
        super().__init__()
        sizes = [(int(r), int(c)) for r, c in generator.integers(1, 80, (count, 2))]
        self.sizes = sizes
        self.linear = nn.ModuleList(nn.Linear(cols, rows) for rows, cols in sizes)
        self.convolutions = nn.ModuleList(nn.Conv2d(1 + c % 7, r, 3) for r, c in sizes)

    def forward(self, x: Tensor) -> Tensor:
        flat, parts = x.flatten(1), []
        for (_, cols), linear, conv in zip(self.sizes, self.linear, self.convolutions, strict=True):
            parts += [linear(flat[:, :cols]), conv(x[:, : 1 + cols % 7]).mean((2, 3))]
        return torch.cat(parts, 1)


def test_a_graph_takes_what_the_plan_says(tmp_path: Path) -> None:
    if find_spec("onnxscript") is None:
        pytest.skip("needs onnxscript")
    formats = ("int4-gc", "int4-gc-asym", "int4-g32-asym", "int2-g64-asym", "int8-g32")
    torch.manual_seed(0)
    module = Several(np.random.default_rng(3), len(formats)).eval().requires_grad_(False)
    images = torch.randn(2, 8, 5, 5)
    model = LoadedModel("several", module, "float32", Workload(module, calibration=[images]))
    names = [unit.name for unit in find_units(module)]
    chosen = dict(zip(names, formats * 2, strict=True))
    plan = hand_made(model, chosen, "onnx")
    assert export(plan, "onnx", tmp_path / "out", model=model).stored == plan.bytes


@pytest.mark.parametrize("name", [n for n in WRITTEN if n != "onnx"])
def test_another_formula_is_noticed(
    name: str, wide: LoadedModel, wide_gguf: Path, tmp_path: Path
) -> None:
    found = Rules.load(name)
    key, exporter, _ = find(name)
    out = tmp_path / f"out{exporter.suffix}"
    done = export(mixed(wide, found), key, out, runtime=name, like=wide_gguf, model=wide)
    more = rules.StoredTensor(tensor="more", per="matrix", bits=8)
    weight = rules.StoredTensor(tensor="codes", per="weight")
    wrong = found.model_copy(update={"storage": (*(found.storage or (weight,)), more)})
    with pytest.raises(ValueError, match="the plan says"):
        check_written(exporter, done.source, out, wrong)


def test_a_plan_for_mlx_fills_its_budget_with_what_mlx_stores(
    wide: LoadedModel, tmp_path: Path
) -> None:
    found = Rules.load("mlx")
    units = find_units(wide.module)
    table = fake_table(units, tuple(n for n in found.candidates if n != "keep"))
    identity = ModelRef(id=wide.id, sha256=state_sha256(wide.module))
    table = replace(table, provenance=table.provenance.model_copy(update={"model": identity}))

    plan = solve(table, "4.6bpw", limits=Limits(rules=found))
    assert plan.runtime == "mlx"
    assert 0.99 * plan.budget.bytes < plan.bytes <= plan.budget.bytes
    done = export(plan, "mlx", tmp_path / "a", model=wide)
    assert done.stored == plan.bytes

    ours = solve(table, "4.6bpw")  # fills the same budget with our own bytes
    assert ours.bytes <= plan.budget.bytes
    stored = export(ours, "mlx", tmp_path / "b", model=wide).stored
    assert stored is not None and stored > 1.01 * plan.budget.bytes


def test_bytes_are_those_of_packed_folders_without_a_runtime() -> None:
    fmt, shape = Format.parse("int3-g64-asym"), (7, 100)
    assert byte_count(None)(fmt, shape) == fmt.stored_bytes(shape)
    with pytest.raises(ValueError, match="Did you mean 'mlx'"):
        byte_count("mlxx")

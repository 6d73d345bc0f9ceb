"""The passes, whole and block by block, against hooks and autograd by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitplan.models.blockwise import BlockwisePass
from bitplan.models.find import find_units
from bitplan.models.passes import Inputs, Pass
from bitplan.models.rendering import Assignment, Renderer
from bitplan.models.samples import Samples, calibration_samples, samples_from_batches
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.sensitivity.factors import Factors, Gradient
from bitplan.sensitivity.probes import data_upstream, stream
from bitplan.sensitivity.reading import UsesReader, whole_pass
from tests.toys import softmax_regression

COARSE = Format.parse("int3-g32-asym")
Seen = dict[tuple[str, int], list[Tensor]]  # matrix, number of the first sample -> inputs


class Layer(nn.Module):
    def __init__(self, shared: nn.Module | None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.shared = shared

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = hidden + self.down(self.up(hidden).tanh())
        return changed if self.shared is None else changed + self.shared(changed).tanh()


class Language(nn.Module):
    """Embedding, three layers with something between the last two, and a tied head.

    A fourth module, ``shared``, is used inside the first and the last layer.
    """

    def __init__(self, looks_back: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.shared = nn.Linear(16, 16)
        self.layers = nn.ModuleList(Layer(self.shared if i != 1 else None) for i in range(3))
        self.between = nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight
        self.looks_back = looks_back

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        first = None
        for i, layer in enumerate(self.layers):
            if i == 2:
                hidden = self.between(hidden)
            hidden = layer(hidden)
            first = hidden if first is None else first
        logits: Tensor = self.head(hidden + first if self.looks_back else hidden)
        return logits


BLOCKS = [
    ["embed"],
    ["shared", "layers.0.up", "layers.0.down"],
    ["layers.1.up", "layers.1.down"],
    ["layers.2.up", "layers.2.down", "between"],
    [],
]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding="same", groups=4),
        nn.Flatten(),
        nn.Linear(12 * 16, 10),
    )


def language(looks_back: bool = False) -> tuple[LoadedModel, Samples]:
    torch.manual_seed(0)
    module = Language(looks_back).requires_grad_(False).eval()
    model = LoadedModel("language", module, "float32", Workload(module))
    return model, samples_from_batches(torch.randint(0, 24, (7, 6)).split(3), model, "toy", 0)


def images() -> tuple[LoadedModel, Samples]:
    torch.manual_seed(0)
    module = convolutions().requires_grad_(False).eval()
    model = LoadedModel("images", module, "float32", Workload(module))
    return model, samples_from_batches(torch.randn(5, 3, 8, 8).split(2), model, "toy", 0)


def regression() -> tuple[LoadedModel, Samples]:
    model, batches = softmax_regression(2)
    return model, samples_from_batches(batches, model, "toy", 0)


CASES: dict[str, Callable[[], tuple[LoadedModel, Samples]]] = {
    "language": language,
    "images": images,
    "regression": regression,
}


def whole(model: LoadedModel, samples: Samples) -> Pass[Gradient]:
    units = find_units(model.module)
    return whole_pass(model, Renderer(model.module, units), units, samples)


def blockwise(model: LoadedModel, samples: Samples) -> Pass[Gradient]:
    """All states between blocks in a file."""
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    reader = UsesReader(model, renderer, samples)
    return BlockwisePass(model, renderer, units, samples, reader, limit=0)


@pytest.fixture(autouse=True, params=["whole", "blockwise"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs over every implementation: what ``whole`` makes here is another pass."""
    if request.param == "blockwise":
        monkeypatch.setattr(sys.modules[__name__], "whole", blockwise)
    return str(request.param)


def by_hand(model: LoadedModel, samples: Samples, plan: Assignment) -> Seen:
    """Inputs of every use on every batch, with the weights of a plan copied into the model."""
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    originals = {name: renderer.weight(name).clone() for name in plan}
    for name, fmt in plan.items():
        renderer.weight(name).copy_(renderer.render(name, fmt))
    seen: Seen = {}
    first = 0
    modules = dict(model.module.named_modules(remove_duplicate=False))
    owner = {modules[alias]: unit.name for unit in units for alias in (unit.name, *unit.aliases)}

    def show(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault((name, first), []).append(args[0].clone())

        return hook

    handles = [module.register_forward_pre_hook(show(name)) for module, name in owner.items()]
    for batch in samples.batches:
        model.logits(batch)
        first += len(batch)
    for handle in handles:
        handle.remove()
    for name, weight in originals.items():
        renderer.weight(name).copy_(weight)
    return seen


def collector(seen: Seen) -> Callable[[Inputs], None]:
    def visit(inputs: Inputs) -> None:
        assert len(inputs.x) == len(inputs.samples) and inputs.scale == 1
        seen.setdefault((inputs.name, inputs.samples.start), []).append(inputs.x.clone())

    return visit


def unfolded(model: LoadedModel, name: str, x: Tensor) -> Tensor:
    """[samples, positions, channel_groups, cols] written as plainly as it can be."""
    module = model.module.get_submodule(name)
    if not isinstance(module, nn.Conv2d):
        return x if not x.is_floating_point() else x.reshape(len(x), -1, 1, x.shape[-1])
    size, step = module.kernel_size[0], module.stride[0]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    rows = range(0, padded.shape[2] - size + 1, step)
    patches = [padded[:, :, i : i + size, j : j + size] for i in rows for j in rows]
    groups = [patch.reshape(len(x), module.groups, -1) for patch in patches]
    return torch.stack(groups, 1)


def batches_of(samples: Samples) -> list[Tensor]:
    return [batch for batch in samples.batches if isinstance(batch, Tensor)]


def assert_same(found: Seen, expected: Seen) -> None:
    assert found.keys() == expected.keys()
    for key, tensors in expected.items():
        assert all(map(torch.equal, found[key], tensors)), key
        assert len(found[key]) == len(tensors)


@pytest.mark.parametrize("case", CASES)
def test_forward_shows_what_hooks_by_hand_see(case: str) -> None:
    model, samples = CASES[case]()
    found: Seen = {}
    told: list[int] = []
    positions = whole(model, samples).forward(collector(found), told.append)
    raw = by_hand(model, samples, {})
    expected = {key: [unfolded(model, key[0], x) for x in xs] for key, xs in raw.items()}
    assert_same(found, expected)
    assert sum(told) == samples.count
    shape = model.logits(samples.batches[0]).shape
    assert positions.tolist() == [shape[1]] * samples.count
    assert not any(module._forward_hooks for module in model.module.modules())


def test_inputs_of_some_matrices_only() -> None:
    found: Seen = {}
    whole(*language()).forward(collector(found), names={"shared", "layers.1.up"})
    assert {name: len(xs) for (name, _), xs in found.items()} == {"shared": 2, "layers.1.up": 1}


def test_inputs_that_no_sample_owns_are_shown_as_a_whole() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.where = nn.Embedding(9, 4), nn.Embedding(6, 4)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.tokens(ids) + self.where(torch.arange(6)[None])
            return logits

    module = Positions().requires_grad_(False).eval()
    model = LoadedModel("positions", module, "float32", Workload(module))
    samples = samples_from_batches(torch.randint(0, 9, (5, 6)).split(3), model, "toy", 0)
    shapes: list[tuple[str, tuple[int, ...], range]] = []
    whole(model, samples).forward(lambda i: shapes.append((i.name, tuple(i.x.shape), i.samples)))
    assert shapes == [
        ("tokens", (3, 6), range(3)),
        ("where", (1, 6), range(3)),
        ("tokens", (2, 6), range(3, 5)),
        ("where", (1, 6), range(3, 5)),
    ]


@pytest.mark.parametrize("case", CASES)
def test_backward_factors_are_the_weight_gradients_of_autograd(case: str) -> None:
    model, samples = CASES[case]()
    logits = torch.cat([model.logits(batch) for batch in samples.batches])
    upstreams = torch.randn(2, *logits.shape)
    starts = iter([s for b in range(0, samples.count, len(samples.batches[0])) for s in (b, b)])
    found: list[dict[str, Tensor]] = [{}, {}]
    order: dict[tuple[int, int], list[int]] = {}

    def probe(number: int) -> Any:
        def upstream(logits: Tensor, batch: Any) -> Tensor:
            start = next(starts)  # once per batch, in order
            return upstreams[number, start : start + len(batch)].clone()  # may be overwritten

        def visit(name: str, factors: Gradient, who: range) -> None:
            if name not in ("shared", "embed"):  # used in several blocks
                order.setdefault((who.start, block_of[name]), []).append(number)
            rows = factors.touched_rows()
            gradient = factors.gradient(slice(None) if rows is None else rows)
            matrix = passes.weight(name)
            sums = found[number].setdefault(name, torch.zeros(samples.count, *matrix.shape))
            sums[who.start : who.stop, slice(None) if rows is None else rows] += gradient

        return upstream, visit

    passes = whole(model, samples)
    block_of = {name: i for i, names in enumerate(passes.blocks) for name in names}
    told: list[int] = []
    positions = passes.backward(probe(0), probe(1), advance=told.append)
    for numbers in order.values():
        assert numbers == sorted(numbers), "of a batch and a block, the first probe comes first"
    assert sum(told) == samples.count
    assert positions.tolist() == [logits.shape[1]] * samples.count
    inputs = [batch[i : i + 1] for batch in batches_of(samples) for i in range(len(batch))]
    for number, gradients in enumerate(found):
        assert gradients.keys() == {unit.name for unit in find_units(model.module)}
        for name, gradient in gradients.items():
            weight = model.module.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad_(True)
            for i, x in enumerate(inputs):
                out = model.logits(x)
                (expected,) = torch.autograd.grad(out, weight, upstreams[number, i : i + 1])
                torch.testing.assert_close(gradient[i], expected.flatten(1), rtol=1e-4, atol=1e-5)
            weight.requires_grad_(False)


def test_blocks_hold_every_matrix_once_where_it_is_first_used(tiny: LoadedModel) -> None:
    assert whole(*language()).blocks == BLOCKS
    assert [len(names) for names in whole(*images()).blocks] == [3], "one block without a stack"
    (only,) = whole(*language(looks_back=True)).blocks
    assert sorted(only) == sorted(name for names in BLOCKS for name in names)
    samples = calibration_samples(tiny, sequences=2, length=16)
    names = whole(tiny, samples).blocks
    assert names[0] == ["model.embed_tokens"] and names[-1] == []
    assert [len(block) for block in names] == [1, 7, 7, 0]


@pytest.mark.parametrize("case", ["language", "tiny"])
def test_a_changed_block_changes_what_follows_as_in_the_changed_model(
    case: str, tiny: LoadedModel
) -> None:
    model, samples = language()
    if case == "tiny":
        model, samples = tiny, calibration_samples(tiny, sequences=5, length=16, batch_tokens=32)
    before = model.logits(samples.batches[0])
    passes = whole(model, samples)
    plan: dict[str, Format] = {}
    shown: Seen = {}  # in the block at hand
    uses: dict[tuple[str, int], int] = {}  # shown so far
    visited: list[int] = []

    def after_block(number: int, names: Sequence[str]) -> Assignment:
        visited.append(number)
        assert list(names) == passes.blocks[number]
        assert set(names) <= {name for name, _ in shown}
        expected = by_hand(model, samples, plan)  # each block sees what the ones before have become
        for key, tensors in shown.items():
            start = uses.get(key, 0)
            uses[key] = start + len(tensors)
            for x, y in zip(tensors, expected[key][start : uses[key]], strict=True):
                assert torch.equal(x.flatten(), y.flatten()), (number, key)
        shown.clear()
        changed = {name: COARSE for i, name in enumerate(names) if i != 1}  # leave one as it is
        plan.update(changed)
        return changed

    passes.sequential(after_block, collector(shown))
    assert visited == list(range(len(passes.blocks)))
    expected = by_hand(model, samples, {})
    assert uses == {key: len(tensors) for key, tensors in expected.items()}, "each use once"
    changed = by_hand(model, samples, plan)
    assert not all(torch.equal(changed[key][-1], expected[key][-1]) for key in expected)
    assert torch.equal(model.logits(samples.batches[0]), before), "the model is as it was"


def test_without_a_visitor_blocks_run_once_and_the_last_part_not_at_all() -> None:
    model, samples = language()
    passes = whole(model, samples)
    assert len(passes.blocks) == 5  # tried out before the count starts
    runs = {"layers.0": 0, "layers.1": 0, "layers.2": 0, "head": 0}

    def count(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            runs[name] += len(args[0])

        return hook

    for layer in ("layers.0", "layers.1", "layers.2", "head"):
        up = layer if layer == "head" else f"{layer}.up"
        model.module.get_submodule(up).register_forward_pre_hook(count(layer))
    passes.sequential(lambda _number, _names: {})
    assert runs == {"layers.0": 7, "layers.1": 7, "layers.2": 7, "head": 0}


def test_a_matrix_of_another_block_cannot_be_changed() -> None:
    model, samples = language()
    with pytest.raises(ValueError, match=r"After block 0, 'layers\.1\.up' was changed.* its 1 mat"):
        whole(model, samples).sequential(lambda _number, _names: {"layers.1.up": COARSE})
    assert not any(module._forward_hooks for module in model.module.modules())


def test_visits_of_a_model_in_one_block_are_those_of_forward() -> None:
    model, samples = images()
    passes = whole(model, samples)
    alone: Seen = {}
    found: Seen = {}
    passes.forward(collector(alone))
    passes.sequential(lambda _number, _names: {}, collector(found))
    assert_same(found, alone)


def test_the_unchanged_model_is_shown_beside_the_changed_one() -> None:
    model, samples = language()
    passes = whole(model, samples)
    alone: Seen = {}
    beside: Seen = {}
    changed: Seen = {}
    order: list[str] = []
    passes.forward(collector(alone))
    see, see_original = collector(changed), collector(beside)

    def visit(shown: Inputs) -> None:
        assert order.pop(0) == f"{shown.name} {shown.samples}"
        see(shown)

    def original(shown: Inputs) -> None:
        order.append(f"{shown.name} {shown.samples}")
        see_original(shown)

    passes.sequential(lambda _number, names: dict.fromkeys(names, COARSE), visit, original)
    assert_same(beside, alone)
    assert changed.keys() == alone.keys() and not order
    assert not torch.equal(changed["layers.2.up", 0][0], alone["layers.2.up", 0][0])


def test_text_labels_reach_the_upstream_through_a_pass() -> None:
    model, samples = language()
    upstream = data_upstream(torch.Generator(), is_language_model=True)
    found: list[tuple[str, Tensor]] = []
    expected: list[tuple[str, Tensor]] = []

    def keep(name: str, gradient: Gradient, _samples: range) -> None:
        assert isinstance(gradient, Factors)
        found.append((name, gradient.delta))

    def keep_plain(name: str, gradient: Gradient) -> None:
        assert isinstance(gradient, Factors)
        expected.append((name, gradient.delta))

    whole(model, samples).backward((upstream, keep))
    renderer = Renderer(model.module, find_units(model.module))
    for batch in samples.batches:
        stream(model, renderer, batch, (upstream, keep_plain))
    assert len(found) == len(expected) == 3 * 11
    for name in dict(expected):  # blocks come one after the other, or batches
        for one, other in zip(of(found, name), of(expected, name), strict=True):
            assert torch.equal(one, other)


def of(found: list[tuple[str, Tensor]], name: str) -> list[Tensor]:
    """What was seen of a matrix, in an order of its own."""
    tensors = [tensor for other, tensor in found if other == name]
    return sorted(tensors, key=lambda tensor: tensor.flatten().tolist())

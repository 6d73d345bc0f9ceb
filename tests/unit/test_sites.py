"""Sites: what a weight is, how its gradient is had, and what is read in its place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitplan.jobs.materialize import apply, assignment_formats, load_packed, quantize
from bitplan.models.coverage import Coverage
from bitplan.models.find import coverage, find_units
from bitplan.models.lazy import LazyWeight
from bitplan.models.load import load_model
from bitplan.models.packing import replace
from bitplan.models.rendering import Renderer
from bitplan.models.sites import Place, places
from bitplan.models.substitute import original_class, restore, substitute
from bitplan.models.units import module_kinds
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.quantizers.runtimes import Rules
from bitplan.search.limits import Limits
from bitplan.search.solve import solve
from bitplan.sensitivity.errors import squared_errors
from bitplan.sensitivity.estimate import profile
from bitplan.sensitivity.uses import uses_of

ARCHITECTURES = Path(__file__).parent.parent / "e2e" / "architectures.py"
FORMATS = ("int2-g32-asym", "int4-g32", "bf16")


def loaded(module: nn.Module) -> LoadedModel:
    module.requires_grad_(False).eval()
    return LoadedModel("toy", module, "float32", Workload(module))


def place_of(module: nn.Module, name: str) -> Place:
    return next(place for place in places(module) if place.name == name)


class Fused(nn.Module):
    """Three experts in one parameter, and a token for which each is responsible."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = transposed
        shape = (3, 8, 6) if transposed else (3, 6, 8)
        self.experts = nn.Parameter(torch.randn(shape))
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        weight = self.experts[ids % 3]  # token t goes to expert t % 3
        if not self.is_transposed:
            weight = weight.transpose(-1, -2)
        logits: Tensor = self.head((x.unsqueeze(-2) @ weight).squeeze(-2))
        return logits


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_one_matrix_with_their_outputs_as_rows(transposed: bool) -> None:
    module = Fused(transposed)
    place = place_of(module, "experts")
    assert (place.site_name, place.shape) == ("experts", (18, 8))
    matrix = place.matrix(place.parameter)
    second = module.experts[1].T if transposed else module.experts[1]
    assert torch.equal(matrix[6:12], second)
    assert torch.equal(place.restored(matrix), module.experts)


@pytest.mark.parametrize(
    "module",
    [
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.Conv3d(2, 4, 3),
        nn.Conv1d(4, 8, 5, groups=4),
        nn.LSTMCell(3, 5),
        nn.Bilinear(3, 4, 5),
        nn.MultiheadAttention(8, 2),
    ],
)
def test_matrices_are_inverted_exactly(module: nn.Module) -> None:
    for place in places(module):
        matrix = place.matrix(place.parameter)
        assert matrix.dim() == 2 and tuple(matrix.shape) == place.shape
        assert torch.equal(place.restored(matrix), place.parameter)


def test_a_transposed_convolution_has_its_output_channels_as_rows() -> None:
    module = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
    (place,) = places(module)
    changed = place.matrix(place.parameter.detach().clone()).clone()
    changed[4] = 0  # the fifth output channel
    x = torch.randn(1, 4, 7)
    before = module(x)
    module.weight.data = place.restored(changed)
    after = module(x)
    assert after[:, 4].abs().max() == 0
    assert torch.equal(after[:, [0, 1, 2, 3, 5]], before[:, [0, 1, 2, 3, 5]])


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 8.0


class Clipped(nn.Linear):
    """Computes a product for small inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


class Matmul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Odd(nn.Module):
    """Layers that are used as their class says, in code of their own, or by their parent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scaled, self.clipped, self.matmul = Scaled(20, 8), Clipped(8, 8), Matmul(8, 8)
        self.plain, self.read, self.both = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.scaled.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.plain(self.matmul(self.clipped(self.scaled(ids)))))
        x = torch.tanh(self.read.weight @ x.transpose(1, 2)).transpose(1, 2)
        x = torch.tanh(self.both(x)) + F.linear(x, self.both.weight)
        logits: Tensor = self.head(x)
        return logits


def test_factors_are_used_only_where_they_give_the_gradient() -> None:
    model = loaded(Odd())
    renderer = Renderer(model.module, find_units(model.module))
    uses = uses_of(model, renderer, [torch.randint(0, 20, (2, 5))])
    assert set(uses.by_autograd) == {"clipped", "read", "both"}
    scales = {use.place.name: use.scale for use in uses.by_factors}
    assert scales == pytest.approx({"scaled": 8, "head": 1, "matmul": 1, "plain": 1})
    assert uses.singly
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())


class TimeFirst(nn.Module):
    """Runs on [positions, samples, features], so inputs do not divide by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embed(ids).transpose(0, 1)))
        logits: Tensor = self.head(x.transpose(0, 1))
        return logits


def test_inputs_are_divided_by_sample_only_if_they_are_those_of_the_samples() -> None:
    torch.manual_seed(0)
    module = TimeFirst()
    ids = torch.randint(0, 20, (4, 4), generator=torch.Generator().manual_seed(0))
    model = loaded(module)
    renderer = Renderer(module, find_units(module))
    assert uses_of(model, renderer, [ids]).singly
    together, alone = (profile(module, b, FORMATS) for b in ([ids], list(ids.split(1))))
    np.testing.assert_allclose(together.kl, alone.kl, rtol=1e-5)


def test_plain_models_stay_in_batches(tiny: LoadedModel) -> None:
    renderer = Renderer(tiny.module, find_units(tiny.module))
    ids = torch.randint(3, 60, (3, 9))
    uses = uses_of(tiny, renderer, [ids])
    assert not uses.singly and not uses.by_autograd
    assert list(uses.pieces([ids])) == [ids]


def test_all_weights_without_effect_are_named_before_the_long_pass() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(x)
            return result

    with pytest.raises(ValueError, match=r"'a' takes no part.* 1 more.*--exclude 'a' .*'b'"):
        profile(Idle(), [torch.ones(2, 4)], FORMATS)


def test_experts_without_tokens_get_the_price_of_the_reached_ones() -> None:
    """In one parameter the scores grow with the error; as units they are the mean of their kind."""
    ids = torch.randint(0, 10, (12, 6), generator=torch.Generator().manual_seed(0)) * 3
    ids[::2] += 1  # experts 0 and 1
    options: dict[str, Any] = {"formats": FORMATS, "metric": "fisher_probe", "include": ["experts"]}
    with pytest.warns(UserWarning, match=r"reached 1 experts \(experts expert 2\)"):
        whole = profile(Fused(), [ids], **options)
    with pytest.warns(UserWarning, match=r"reached 1 experts \(experts\[rows:2\]\)"):
        single = profile(Fused(), [ids], **options, per_expert=True)
    assert Coverage.from_json(single.provenance.coverage or {}).unreached == ("experts[rows:2]",)
    renderer = Renderer(Fused(), single.units)
    formats = [Format.parse(name) for name in FORMATS]
    errors = np.array([squared_errors(renderer, name, formats) for name in renderer.names])
    expected = (single.kl[0] + single.kl[1]) / (errors[0] + errors[1]) * errors[2]
    np.testing.assert_allclose(single.kl[2], expected, rtol=1e-4)
    # A sequence here reaches one expert, so that scores of the experts do not mix.
    total = (single.kl[0] + single.kl[1]) * errors.sum(0) / (errors[0] + errors[1])
    np.testing.assert_allclose(whole.kl[0], total, rtol=1e-4)


def test_experts_in_a_list_are_one_unit_and_priced_by_those_reached() -> None:
    model = load_model(f"{ARCHITECTURES}:routed", "cpu")
    module: Any = model.module
    module.router.bias[3] = -100
    with pytest.warns(UserWarning, match=r"reached 2 experts \(experts\.3\.0, experts\.3\.2\)"):
        table = profile(model, model.workload.calibration, FORMATS)
    assert [unit.name for unit in table.units] == [
        "embed",
        "router",
        "experts.*.0",
        "experts.*.2",
        "head",
    ]
    assert table.units[2].modules == tuple(f"experts.{i}.0" for i in range(4))
    single = None
    with pytest.warns(UserWarning):
        single = profile(model, model.workload.calibration, FORMATS, per_expert=True)
    prices = {unit.name: single.kl[u, 0] for u, unit in enumerate(single.units)}
    assert 0 < prices["experts.3.0"] < 3 * max(prices[f"experts.{i}.0"] for i in range(3))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "routed"])
def test_every_expert_can_have_a_format_of_its_own(name: str, tmp_path: Path) -> None:
    model = load_model(f"{ARCHITECTURES}:{name}", "cpu")
    table = profile(model, model.workload.calibration, FORMATS, per_expert=True)
    plan = solve(table, "3.5bpw")
    experts = [n for n in plan.assignments if "[rows:" in n] or [
        n for n in plan.assignments if n.startswith("experts.")
    ]
    assert len({plan.assignments[n] for n in experts}) > 1
    batch = model.workload.calibration[0]
    with torch.no_grad():
        with Renderer(model.module, table.units).applied(assignment_formats(plan)):
            expected = model.logits(batch)
        packed = load_packed(quantize(plan, tmp_path / "packed", model), tokenizer=False)
        found = packed.logits(batch)
        apply(model.module, plan)
        in_place = model.logits(batch)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(in_place, expected, rtol=0, atol=2e-5 * scale)


def test_a_weight_too_large_for_a_format_closes_that_format_only() -> None:
    first = nn.Linear(8, 8)
    module = nn.Sequential(first, nn.Linear(8, 4))
    with torch.no_grad():
        first.weight[0, 0] = 9e5
    with pytest.warns(UserWarning, match="too large for some formats.*'0'"):
        table = profile(module, [torch.randn(4, 8)], FORMATS)
    assert np.isnan(table.kl[0]).tolist() == [True, True, False]
    assert np.isfinite(table.kl[1]).all()
    with pytest.raises(ValueError, match=r"No format given can hold '0'\. A weight of 9"):
        profile(module, [torch.randn(4, 8)], FORMATS[:2])


def test_projections_of_a_list_of_experts_fuse_as_others_do() -> None:
    def expert() -> nn.Module:
        return nn.ModuleDict({"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6)})

    layer = {"experts": nn.ModuleList(expert() for _ in range(3)), "q": nn.Linear(4, 4)}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(layer)])})
    fused, _ = find_units(model, groups=["gate,up"])
    assert (fused.name, fused.kind) == ("layers.0.experts.*.{gate,up}", "experts.*.{gate,up}")
    assert fused.weights == 3 * 2 * 24
    kinds = ("experts.*.gate",) * 3 + ("experts.*.up",) * 3
    assert dict(zip(fused.modules, module_kinds(fused), strict=True)) == {
        f"layers.0.experts.{i}.{part}": kinds[3 * (part == "up")]
        for part in ("gate", "up")
        for i in range(3)
    }


def test_a_runtime_keeps_the_layers_it_does_not_quantize_as_floats() -> None:
    table = profile(Fused(), [torch.randint(0, 30, (2, 6))], ("int4-g32", "bf16"))
    assert table.provenance.layer_types == {"embed": "embedding", "experts": "experts"}
    plan = solve(table, "1MB", limits=Limits(rules=Rules.load("mlx")))
    assert plan.assignments["experts"] == "bf16"
    refusal = Rules.load("mlx").layer_refusal(Format.parse("int4-g32"), "experts")
    assert refusal is not None and refusal.startswith("layers: it quantizes linear")


def test_metrics_of_inputs_say_which_weight_has_none() -> None:
    with pytest.raises(ValueError, match=r"imatrix looks at .* 'experts' \(in a Fused\)"):
        profile(Fused(), [torch.randint(0, 30, (2, 6))], FORMATS, metric="imatrix")


@pytest.mark.parametrize("metric", ["hessian_trace", "gradient", "taylor", "weight_mse"])
def test_other_metrics_price_experts(metric: str) -> None:
    table = profile(Fused(), [torch.randint(0, 30, (4, 6))] * 2, FORMATS, metric=metric)
    assert (table.kl[:, 0] > 0).all()


def counted(weight: Tensor, calls: list[int | None]) -> LazyWeight:
    def whole() -> Tensor:
        calls.append(None)
        return weight

    def some(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return weight[rows]

    return LazyWeight(weight.shape, weight, whole, some)


@pytest.mark.parametrize(
    ("use", "rows"),
    [
        (lambda w: w[2], 1),
        (lambda w: w[-1], 1),
        (lambda w: w[torch.tensor(3)], 1),
        (lambda w: w[1:4], 3),
        (lambda w: w[torch.tensor([[4, 4], [0, 4]])], 2),
        (lambda w: F.embedding(torch.tensor([[5, 1, 5]]), w), 2),
        (lambda w: torch.randn(2, 4, generator=torch.Generator().manual_seed(0)) @ w.T, None),
        (lambda w: w @ torch.ones(4), None),
        (lambda w: 2 * w, None),
        (lambda w: F.linear(torch.ones(3, 4), w), None),
        (lambda w: torch.stack([w, w])[:, 0], None),
        (lambda w: w.sum(0), None),
    ],
)
def test_a_lazy_weight_is_the_tensor_and_makes_only_what_is_used(
    use: Callable[[Tensor | LazyWeight], Tensor], rows: int | None
) -> None:
    weight, calls = torch.randn(6, 4), list[int | None]()
    lazy = counted(weight, calls)
    assert (lazy.shape, lazy.dtype, lazy.dim(), len(lazy), lazy.size(1)) == (
        weight.shape,
        weight.dtype,
        2,
        6,
        4,
    )
    assert not calls
    assert torch.equal(use(lazy), use(weight))
    assert set(calls) == {rows}


def test_what_is_substituted_is_read_by_everyone_and_restored() -> None:
    module = Odd()
    place = place_of(module, "read")
    kind, original = type(module.read), module.read.weight
    substitute(place, lambda _: torch.zeros(8, 8))
    assert isinstance(module.read, nn.Linear) and original_class(module.read) is kind
    assert not module.read.weight.any() and place.parameter is original
    assert not F.linear(torch.ones(8), module.read.weight).any()
    restore(place)
    assert type(module.read) is kind and module.read.weight is original


def test_packed_modules_can_be_copied_pickled_and_moved() -> None:
    model = load_model(f"{ARCHITECTURES}:lstm", "cpu")
    module: Any = model.module
    batch, _ = model.workload.calibration
    renderer = Renderer(module, find_units(module))
    fmt = Format.parse("int4-g32")
    packed = {name: renderer.store.packed(name, fmt) for name in renderer.names}
    with torch.no_grad(), renderer.applied(dict.fromkeys(renderer.names, fmt)):
        expected = module(batch)
    replace(module, packed, {})
    assert not any(p.dim() > 1 for p in module.parameters())  # nothing dense is left
    assert all(w is None or w.dim() == 1 for w in module.lstm._flat_weights)
    module.to(torch.float32)
    assert all(w is None or w.dim() == 1 for w in module.lstm._flat_weights)
    copied, revived = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    with torch.no_grad():
        for found in (module, copied, revived):
            torch.testing.assert_close(found(batch), expected)
        copied.lstm._modules["weight_ih_l0"].codes.zero_()
        assert not torch.allclose(copied(batch), expected)  # a copy reads its own weights
        torch.testing.assert_close(module(batch), expected)


def test_coverage_below_nine_tenths_is_refused_unless_it_was_asked_for() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    some = find_units(module, include=["1"])
    found = coverage(module, some)
    assert (found.planned, found.weights, found.share) == (16, 80, 0.2)
    with pytest.raises(ValueError, match=r"20% of the model's weights.*0 \(64 weights"):
        found.require("3bpw")
    coverage(module, some, selected=True).require("3bpw")
    coverage(module, find_units(module)).require("3bpw")
    assert Coverage.from_json(found.to_json()) == found

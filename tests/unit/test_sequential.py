"""Rounding again, block by block: sums over the inputs of the rounded model, and what they give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitplan.models.find import find_units
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, samples_from_batches
from bitplan.models.units import UnitInfo
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.drift import drift_target
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import Evidence
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.store import Renderings
from bitplan.sensitivity.evidence import calibrated
from bitplan.sensitivity.sequential import Sequential
from bitplan.testing.toys import drawn, toy_of

WIDTH, CLASSES = 32, 24
INT2 = Format.parse("int2-g32-asym")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = hidden + self.down(self.up(hidden).tanh())
        return changed


class Language(nn.Module):
    """Embedding, three layers, one that is used after the first and the last, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden)
            hidden = hidden if i == 1 else hidden + self.twice(hidden).tanh()
        logits: Tensor = self.head(hidden)
        return logits


Case = tuple[LoadedModel, list[UnitInfo], Renderer, Samples]


def case(rounding: str, folder: Path | None = None) -> Case:
    model = toy_of(Language(), std=0.3)
    ids = torch.randint(CLASSES, (24, 10), generator=torch.Generator().manual_seed(1))
    samples = samples_from_batches(ids.split(5), model, "toy", 0)
    units = find_units(model.module)
    renderer = calibrated(
        model, units, rounding, samples, model_sha256="toy", folder=folder, statistics=folder
    )
    return model, list(units), renderer, samples


def plan(renderer: Renderer) -> dict[str, Format]:
    return dict.fromkeys(renderer.names, INT2)


def inputs_of(model: LoadedModel, module: nn.Module, samples: Samples) -> Tensor:
    """What a module multiplies [vectors, cols], float64."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in samples.batches:
            model.logits(batch)
    handle.remove()
    return torch.cat(found).double()


class Spy:
    """Keeps what the store is asked to round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, tuple[Tensor, Evidence]] = {}
        real = Renderings.round

        def spied(
            store: Renderings, name: str, fmt: Format, weight: Tensor, evidence: Evidence
        ) -> PackedTensor:
            self.asked[name] = weight.clone(), evidence
            return real(store, name, fmt, weight, evidence)

        monkeypatch.setattr(Renderings, "round", spied)


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_the_target_of_drifted_inputs_is_that_of_least_squares(damping: float) -> None:
    rows, cols, count = 5, 7, 40
    weight, x = drawn((rows, cols), 1), drawn((count, cols), 2)
    y, u = x + 0.4 * drawn((count, cols), 3), drawn((count,), 4).square()
    moments, shift = y.T @ (u[:, None] * y), (x - y).T @ (u[:, None] * y)
    found = drift_target(weight, moments, shift, damping)
    # The same as a least-squares problem in float64: rows sqrt(u) y, and sqrt(l) I towards W.
    added = (damping * moments.diagonal().mean().double()).sqrt()
    root = u.double().sqrt()[:, None]
    left = torch.cat([root * y.double(), added * torch.eye(cols, dtype=torch.float64)])
    right = torch.cat([root * (x.double() @ weight.double().T), added * weight.double().T])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - weight).norm()) > 0.05 * float(weight.norm())


def test_without_drift_the_target_is_the_weight() -> None:
    weight, y = drawn((3, 4), 1), drawn((9, 4), 2)
    assert torch.equal(drift_target(weight, y.T @ y, torch.zeros(4, 4)), weight)


def test_the_curvature_of_the_first_block_is_that_of_the_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, units, renderer, samples = case("fisher_gptq")
    renderer.store.complete(plan(renderer).items())
    spy = Spy(monkeypatch)
    assignment = {name: INT2 for name in renderer.names if name != "embed"}
    Sequential(model, units, renderer, assignment, samples, drift=False).run()
    first, later = "layers.0.up", "layers.1.up"
    known = dict(next(iter(renderer.store.evidence.gather([first, later]))))  # type: ignore[union-attr]
    for name in (first, later):
        weight, evidence = spy.asked[name]
        assert torch.equal(weight, renderer.weight(name))
        assert evidence.fisher is not None and known[name].fisher is not None
        assert evidence.rows is not None and torch.equal(evidence.rows, known[name].rows)
        assert evidence.damping == known[name].damping
        error = float((evidence.fisher - known[name].fisher).norm() / known[name].fisher.norm())
        assert error < 1e-5 if name == first else error > 1e-3


def test_sums_are_over_the_inputs_of_the_rounded_blocks_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, units, renderer, samples = case("gptq")
    spy = Spy(monkeypatch)
    after = Sequential(model, units, renderer, plan(renderer), samples).run()
    name = "layers.2.up"
    module = model.module.get_submodule(name)
    x = inputs_of(model, module, samples)
    before = {
        n: INT2 for n in renderer.names if n[:8] in ("embed", "twice", "layers.0", "layers.1")
    }
    with after.applied(before):
        y = inputs_of(model, module, samples)
    weight, evidence = spy.asked[name]
    moments = y.T @ y / len(y)
    assert evidence.hessian is not None
    torch.testing.assert_close(evidence.hessian.double(), moments, rtol=1e-4, atol=1e-6)
    expected = drift_target(renderer.weight(name).double(), moments, (x - y).T @ y / len(y))
    torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-5)
    assert float((weight - renderer.weight(name)).norm()) > 1e-3


@pytest.mark.parametrize("rounding", ["gptq", "fisher_gptq"])
def test_formats_and_bytes_stay_and_other_matrices_keep_their_codes(rounding: str) -> None:
    model, units, renderer, samples = case(rounding)
    assignment = plan(renderer)
    before = {n: renderer.store.packed(n, f) for n, f in assignment.items() if f == INT2}
    after = Sequential(model, units, renderer, assignment, samples).run()
    changed = set()
    for name, packed in before.items():
        found = after.store.packed(name, INT2)
        assert (found.fmt, found.shape, found.nbytes) == (packed.fmt, packed.shape, packed.nbytes)
        assert torch.equal(after.render(name, INT2), found.dequantize())
        assert torch.equal(renderer.store.packed(name, INT2).dequantize(), packed.dequantize())
        if not torch.equal(found.dequantize(), packed.dequantize()):
            changed.add(name)
    assert {"layers.1.up", "layers.2.down", "head"} <= changed
    assert not {"embed", "twice"} & changed


def test_an_interrupted_run_comes_to_the_same_codes() -> None:
    model, units, renderer, samples = case("fisher_gptq")
    assignment = plan(renderer)
    kept: dict[str, PackedTensor] = {}

    def killed(codes: dict[str, PackedTensor]) -> None:
        if len(kept) >= 4:
            raise KeyboardInterrupt
        kept.update(codes)

    whole = Sequential(model, units, renderer, assignment, samples).run()
    with pytest.raises(KeyboardInterrupt):
        Sequential(model, units, renderer, assignment, samples).run(keep=killed)  # type: ignore[arg-type]
    assert set(kept) == {f"layers.{i}.{part}" for i in range(2) for part in ("up", "down")}
    later: dict[str, PackedTensor] = {}
    rest = Sequential(model, units, renderer, assignment, samples)
    found = rest.run(kept, later.update)
    assert not later.keys() & kept.keys()
    for name, fmt in assignment.items():
        assert torch.equal(found.render(name, fmt), whole.render(name, fmt)), name

"""Fisher statistics: that the sums are those of gradients, whatever the form they come in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitplan.models.find import find_units
from bitplan.models.mixture import parse_shares, turns
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, calibration_samples, samples_from_batches
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.methods.gptq import gptq, has_own_codes
from bitplan.quantizers.packed import PackedTensor
from bitplan.sensitivity import statistics as module
from bitplan.sensitivity.factors import Factors, Gradient
from bitplan.sensitivity.kept_sums import Fold, halved, restored
from bitplan.sensitivity.metrics import METRICS, Task
from bitplan.sensitivity.mixture import UNTESTED, Trial, choose
from bitplan.sensitivity.nearest import nearest_prices
from bitplan.sensitivity.probes import label_upstream, stream
from bitplan.sensitivity.statistics import LIMIT, Statistics
from bitplan.sensitivity.uses import uses_of
from bitplan.testing import toy_task
from bitplan.testing.toys import drawn, toy_of

CPU = torch.device("cpu")


def curved(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
    """GPTQ on the curvature."""
    if evidence.fisher is None:
        return METHODS.get("rtn")(weight, fmt, evidence)
    damped = evidence.fisher.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal.add_((evidence.damping or 0.07) * diagonal.mean(-1, keepdim=True))
    return gptq(weight, fmt, Evidence(hessian=damped))


@pytest.fixture(autouse=True)
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._found, "curved", curved)
    monkeypatch.setitem(METHODS._traits, "curved", {"needs": {"fisher"}, "rounds": has_own_codes})


def made(
    model: LoadedModel, samples: Samples, folder: Path | None = None, limit: int = LIMIT
) -> tuple[Statistics, Renderer]:
    units = find_units(model.module)
    renderer = Renderer(model.module, units, "curved")
    found = Statistics(
        model, units, renderer, lambda: samples, samples.sha256, folder=folder, limit=limit
    )
    renderer.store.evidence = found
    return found, renderer


def sums(model: LoadedModel, samples: Samples) -> dict[str, Fold]:
    statistics, renderer = made(model, samples)
    (evidences,) = statistics.gather(renderer.names)
    reached = [n for n in renderer.names if evidences[n].fisher is not None]
    return {name: statistics._kept.read(name, CPU) for name in reached}


def seen(model: LoadedModel, samples: Samples) -> dict[str, list[Tensor]]:
    """Gradients of every matrix by sequence, products alone of a tied one; from the same labels."""
    renderer = Renderer(model.module, find_units(model.module))
    found: dict[str, list[Tensor]] = {}

    def visit(name: str, source: Gradient) -> None:
        if not isinstance(source, Factors) or source.x.is_floating_point():
            found.setdefault(name, []).extend(source.gradient(slice(None)))

    upstream = label_upstream(torch.Generator().manual_seed(0))
    for batch in uses_of(model, renderer, samples.batches).pieces(samples.batches):
        stream(model, renderer, batch, (upstream, visit))
    return found


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0])
        return out


class Experts(nn.Module):
    """Three experts in one parameter, of which the last is never taken."""

    num_experts = 3

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 5, 6))
        self.head = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        taken = (x[..., 0] > 0).long()
        out: Tensor = self.head(torch.einsum("nti,ntoi->nto", x, self.up[taken]).tanh())
        return out


class OneRow(nn.Module):
    """A matrix of one row, that all tokens of a sequence share their sums through."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(6, 1), nn.Linear(1, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wide(torch.tanh(self.narrow(x)))
        return out


def vectors(net: nn.Module, positions: int = 9) -> tuple[LoadedModel, Samples]:
    model = toy_of(net, std=0.5)
    batches = [drawn((n, positions, 6), i) for i, n in enumerate((3, 4))]
    return model, samples_from_batches(batches, model, "x", 0)


def toy() -> tuple[LoadedModel, Samples]:
    task = toy_task()
    return task.model, task.samples


CASES: dict[str, Callable[[], tuple[LoadedModel, Samples]]] = {
    "embedding, grouped convolution, MLP": toy,
    "recurrent": lambda: vectors(Recurrent()),
    "experts": lambda: vectors(Experts()),
    "more tokens than rows": lambda: vectors(OneRow()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sequence_form_is_that_of_gradients(case: str) -> None:
    model, samples = CASES[case]()
    found, gradients = sums(model, samples), seen(model, samples)
    assert found.keys() == gradients.keys()
    positions = {"embedding, grouped convolution, MLP": 12}.get(case, 9)
    for name, fold in found.items():
        parts = len(fold.forms["sequence"])
        assert parts == {"mix": 2, "up": 3 if case == "experts" else 1}.get(name, 1)
        g = torch.stack(gradients[name]).unflatten(1, (parts, -1))  # [N, parts, rows, cols]
        assert fold.tokens == samples.count * positions
        expected = torch.einsum("nprc,nprd->pcd", g, g) / (fold.tokens * g.shape[2])
        torch.testing.assert_close(fold.fisher(), expected, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(fold.fisher(), fold.fisher().mT)


def test_other_forms_and_rows_are_sums_over_tokens(tiny: LoadedModel) -> None:
    samples = calibration_samples(tiny, sequences=6, length=32)
    found, factors = sums(tiny, samples), dict[str, list[Factors]]()
    renderer = Renderer(tiny.module, find_units(tiny.module))

    def visit(name: str, source: Gradient) -> None:
        if isinstance(source, Factors) and source.x.is_floating_point():
            factors.setdefault(name, []).append(source)

    upstream = label_upstream(torch.Generator().manual_seed(0))
    for batch in samples.batches:
        stream(tiny, renderer, batch, (upstream, visit))
    assert found.keys() == factors.keys() == set(renderer.names)  # the tied head among them
    for name, some in factors.items():
        x = torch.cat([one.x[:, :, 0].flatten(0, 1) for one in some])
        d = torch.cat([one.delta[:, :, 0].flatten(0, 1) for one in some])
        fold, weights = found[name], d.square().sum(1)
        for form, expected in (("plain", x.T @ x), ("token", x.T @ (x * weights[:, None]))):
            torch.testing.assert_close(
                restored(fold.forms[form])[0], expected, rtol=1e-3, atol=1e-5
            )
        torch.testing.assert_close(fold.rows, d.square().sum(0), rtol=1e-4, atol=1e-9)
        assert float(fold.relative_rows().mean()) == pytest.approx(1)
        assert torch.allclose(fold.hessian(), x.T @ x / len(x), rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]
        mixed, level = fold.fisher(1.0, 0.3), fold.fisher().diagonal(dim1=1, dim2=2).mean()
        assert float(mixed.diagonal(dim1=1, dim2=2).mean()) == pytest.approx(float(level), rel=1e-4)
        assert not torch.allclose(mixed, fold.fisher(), rtol=1e-2)


def test_one_row_costs_what_the_metric_says() -> None:
    """1/2 E fisher E^T is then the mean of <G, E>^2 / 2T exactly, format by format."""
    model, samples = vectors(OneRow())
    fold, units = sums(model, samples)["narrow"], find_units(model.module)
    renderer = Renderer(model.module, units)
    formats = [Format.parse(name) for name in ("int2-gc", "int3-gc-asym", "int5-gc")]
    task = Task(model, units, formats, renderer, samples, 0, lambda _: None)
    scores = METRICS.get("fisher_probe")(task).values[:, 0].astype(np.float64)
    for f, fmt in enumerate(formats):
        error = renderer.render("narrow", fmt) - renderer.weight("narrow")
        price = float(error @ fold.fisher()[0] @ error.T) / 2
        assert price == pytest.approx((scores[:, f] ** 2).mean(), rel=1e-4)


def test_many_rows_cost_what_the_metric_says_in_expectation() -> None:
    """Over errors without a direction of their own, such as those of rounding."""
    model, samples = toy()
    fold, gradients = sums(model, samples)["up"], torch.stack(seen(model, samples)["up"])
    errors = torch.randn(3000, *gradients.shape[1:], generator=torch.Generator().manual_seed(1))
    errors *= drawn((1, gradients.shape[2]), 3).abs()  # columns of different sizes
    products = torch.einsum("nrc,erc->en", gradients, errors)
    probe = (products.square().sum(1) / (2 * fold.tokens)).mean()
    quadratic = torch.einsum("erc,cd,erd->e", errors, fold.fisher()[0], errors).mean() / 2
    assert float(quadratic) == pytest.approx(float(probe), rel=0.05)


@pytest.mark.parametrize(("net", "name"), [(OneRow, "narrow"), (Recurrent, "lstm.weight_ih_l0")])
def test_folds_add_up(net: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = vectors(net())
    in_two = sums(model, samples)
    statistics, renderer = made(model, samples)
    list(statistics.gather(renderer.names))
    gradients = torch.stack(seen(model, samples)[name])
    for i in (0, 1):
        own = [j for j in range(len(gradients)) if module.fold_of(j) == i]
        fold, g = statistics._kept.read(name, CPU, i), gradients[own]
        assert fold.tokens == len(g) * 9
        expected = torch.einsum("nrc,nrd->cd", g, g) / (fold.tokens * g.shape[1])
        torch.testing.assert_close(fold.fisher()[0], expected, rtol=1e-4, atol=1e-9)
    monkeypatch.setattr(module, "TRIALS", 0)
    in_one = sums(model, samples)
    for other, fold in in_two.items():
        assert (fold.tokens, fold.vectors) == (in_one[other].tokens, in_one[other].vectors)
        torch.testing.assert_close(fold.rows, in_one[other].rows)
        for form, half in fold.forms.items():
            torch.testing.assert_close(half, in_one[other].forms[form], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["prose:1,code:1", "prose:2,code:1,chat:1", "mixture"])
def test_both_folds_have_all_texts(text: str) -> None:
    shares = parse_shares(text)
    order = np.array(turns(shares, 96 + 128)[96:])
    folds = np.array([module.fold_of(i) for i in range(len(order))])
    counts = np.array(
        [[np.sum(folds[order == k] == i) for i in (0, 1)] for k in range(len(shares))]
    )
    assert counts.min(1).sum() >= 0.4 * len(order) and (counts > 3).all(), counts


def test_few_at_a_time_and_other_batches_give_the_same(tiny: LoadedModel) -> None:
    samples = calibration_samples(tiny, sequences=6, length=32)
    whole = sums(tiny, samples)
    statistics, renderer = made(tiny, calibration_samples(tiny, sequences=6, length=32), limit=1)
    passes = count_passes(statistics)
    list(statistics.gather(renderer.names))
    assert len(passes) > 4
    smaller = calibration_samples(tiny, sequences=6, length=32, batch_tokens=32)
    for found in (sums(tiny, smaller), {n: statistics._kept.read(n, CPU) for n in whole}):
        for name, fold in whole.items():
            for form, half in fold.forms.items():
                assert torch.equal(half, found[name].forms[form])


def count_passes(statistics: Statistics) -> list[int]:
    """How many matrices are summed in every pass from here on."""
    counted: list[int] = []
    original = statistics._sum

    def counting(shared, *rest):  # type: ignore[no-untyped-def]
        counted.append(sum(len(one.rows) for one in shared))
        original(shared, *rest)

    statistics._sum = counting  # type: ignore[method-assign]
    return counted


def test_what_is_kept_is_not_gathered_again(tmp_path: Path) -> None:
    model, samples = toy()
    first, renderer = made(model, samples, tmp_path)
    passes = count_passes(first)
    before = dict(next(iter(first.gather(["up"]))))
    assert passes == [1]
    list(first.gather(renderer.names))
    assert passes == [1, 3]  # all but the first, tied embedding among them
    again, _ = made(model, samples, tmp_path)
    passes = count_passes(again)
    (found,) = again.gather(renderer.names)
    assert not passes
    assert again.chosen == first.chosen and again.chosen.keys() == {"embed", "mix", "up", "down"}
    assert before["up"].fisher is not None and found["up"].fisher is not None
    assert torch.equal(before["up"].fisher, found["up"].fisher)
    damaged = sorted(tmp_path.rglob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    third, _ = made(model, samples, tmp_path)
    passes = count_passes(third)
    list(third.gather(renderer.names))
    assert passes == [1]
    other = samples_from_batches(samples.batches[:1], model, "x", 0)
    fourth, _ = made(model, other, tmp_path)
    assert fourth.key != first.key
    passes = count_passes(fourth)
    list(fourth.gather(renderer.names))
    assert passes == [4]


@pytest.mark.parametrize("what", ["GRID", "REVISION"])
def test_other_ways_to_choose_and_to_sum_have_another_key(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = toy()
    before = made(model, samples)[0].key
    assert made(model, samples)[0].key == before
    monkeypatch.setattr(module, what, "another")
    assert made(model, samples)[0].key != before


def test_lookups_and_what_nothing_reaches_have_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids))
            return out

    model = toy_of(Net())
    samples = samples_from_batches([torch.arange(8).view(2, 4)], model, "x", 0)
    statistics, renderer = made(model, samples)
    (found,) = statistics.gather(renderer.names)
    assert found["embed"] == Evidence()
    assert found["head"].fisher is not None and found["head"].fisher.shape == (6, 6)
    packed = renderer.store.packed("embed", Format.parse("int3-gc"))
    nearest = METHODS.get("rtn")(renderer.weight("embed"), Format.parse("int3-gc"), Evidence())
    assert torch.equal(packed.dequantize(), nearest.dequantize())


def test_a_gradient_that_overflows_is_named() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    model = toy_of(nn.Sequential(first, second))
    first.bias.fill_(1e30)
    second.weight.fill_(1e-30)
    samples = samples_from_batches([torch.randn(3, 4)], model, "x", 0)
    statistics, renderer = made(model, samples)
    with pytest.raises(ValueError, match="gradient of '1' has NaN or Inf"):
        list(statistics.gather(renderer.names))


@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_half_of_a_symmetric_matrix_is_all_of_it(size: int) -> None:
    square = drawn((2, size, size), 0)
    square = square + square.mT
    half = halved(square.tril() + drawn((size, size), 1).triu(1))  # above lies what was not summed
    assert half[0].numel() <= (size + 1) * (size + 1) // 2 + size
    assert torch.equal(restored(half), square)


def fold_of(vectors: Tensor) -> Fold:
    square = halved((vectors.T @ vectors)[None])
    forms = {"sequence": square, "token": square.clone(), "plain": square.clone()}
    return Fold(len(vectors), len(vectors), torch.ones(16), forms)


def test_damping_grows_with_the_noise_of_the_sums() -> None:
    def trial(count: int, seed: int, halves: tuple[int, int]) -> Trial:
        together = drawn((12, 48), 200 + seed)
        draws = [
            drawn((count, 12), 10 * seed + i) @ together + 2 * drawn((count, 48), 10 * seed + 5 + i)
            for i in halves
        ]
        found = Trial.of(drawn((16, 48), 100 + seed), (fold_of(draws[0]), fold_of(draws[1])))
        assert found is not None
        return found

    def chosen(count: int, halves: tuple[int, int] = (1, 2)) -> float:
        trials = [trial(count, seed, halves) for seed in range(4)]
        mixture = choose(trials, "curved")
        assert mixture == choose(trials, "curved")
        assert mixture.damping is not None
        return mixture.damping

    assert chosen(24) >= 0.3  # fewer vectors than columns
    assert chosen(5000) <= 0.06
    assert chosen(24, (1, 1)) <= 0.06  # who is judged by what it saw finds nothing to distrust


def test_mixtures_are_untested_where_nothing_was_held_out() -> None:
    weight, vectors = drawn((16, 48), 0), drawn((24, 48), 1)
    whole = fold_of(vectors)
    nothing = Fold(0, 0, torch.zeros(16), {n: torch.zeros_like(f) for n, f in whole.forms.items()})
    assert Trial.of(weight, (whole, nothing)) is None
    assert choose([], "curved") == UNTESTED


def test_what_rounding_to_nearest_would_cost() -> None:
    model, samples = vectors(OneRow())
    statistics, renderer = made(model, samples)
    fmt = Format.parse("int2-gc")
    units = find_units(model.module)
    (evidences,) = statistics.gather(renderer.names)
    renderer.store.complete(((name, fmt) for name in renderer.names), None)
    found = nearest_prices(renderer, units, dict.fromkeys(renderer.names, fmt))
    assert set(found) == {unit.name for unit in units}
    gradients = seen(model, samples)
    for unit in units:
        (name,) = unit.modules
        weight = renderer.weight(name)
        error = METHODS.get("rtn")(weight, fmt, Evidence()).dequantize() - weight
        tokens = 7 * 9
        per_row = torch.stack([(g * error).sum(1).square() for g in gradients[name]]).sum(0)
        if len(weight) == 1:  # then every row has its own curvature, and the price is exact
            assert found[unit.name] == pytest.approx(float(per_row.sum()) / 2 / tokens, rel=1e-4)
        assert found[unit.name] > 0
    assert evidences[units[0].modules[0]].fisher is not None
    assert not nearest_prices(Renderer(model.module, units), units, dict.fromkeys(found, fmt))

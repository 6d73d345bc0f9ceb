"""The streaming pass against plain autograd, and the Fisher probe against the exact form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitplan.models.find import find_units
from bitplan.models.passes import Upstream
from bitplan.models.rendering import Renderer
from bitplan.models.workload import Batch, LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.sensitivity.estimate import profile
from bitplan.sensitivity.factors import Gradient, gradient_products, inner
from bitplan.sensitivity.probes import (
    data_upstream,
    gaussian_upstream,
    label_upstream,
    stream,
)
from bitplan.sensitivity.uses import uses_of

FORMATS = tuple(map(Format.parse, ("int2-g32-asym", "int4-gc", "bf16")))


class Tied(nn.Module):
    """Embedding -> Conv1D -> linear head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.mix = Conv1D(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.embed(ids))))
        return logits


class TiedByMemory(Tied):
    """The same with a parameter of its own on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.data)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding="same", groups=4),
        nn.Flatten(),
        nn.Linear(12 * 16, 10),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "tied language model": (Tied, lambda: torch.randint(0, 40, (3, 7))),
    "grouped convolutions": (convnet, lambda: torch.randn(3, 3, 8, 8)),
}


def load(factory: Callable[[], nn.Module]) -> LoadedModel:
    torch.manual_seed(0)
    module = factory()
    module.requires_grad_(False).eval()
    return LoadedModel("toy", module, "float32", Workload(module))


@pytest.mark.parametrize("case", CASES)
def test_inner_products_equal_autograd_per_sample(case: str) -> None:
    factory, batch_of = CASES[case]
    model, batch = load(factory), batch_of()
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    upstream_gradient = torch.randn_like(model.logits(batch))

    found = {unit.name: np.zeros((3, len(FORMATS))) for unit in units}

    def visit(name: str, factors: Gradient) -> None:
        found[name] += gradient_products(factors, renderer, name, FORMATS, [inner])[0]

    stream(model, renderer, batch, (lambda _logits, _batch: upstream_gradient, visit))

    modules = dict(model.module.named_modules())
    for unit in units:
        parameter = modules[unit.name].weight
        errors = [renderer.render(unit.name, f) - renderer.weight(unit.name) for f in FORMATS]
        for sample in range(3):
            parameter.requires_grad_(True)
            logits = model.logits(batch[sample : sample + 1])
            (gradient,) = torch.autograd.grad(
                logits, parameter, upstream_gradient[sample : sample + 1]
            )
            parameter.requires_grad_(False)
            transposed = isinstance(modules[unit.name], Conv1D)
            shaped = gradient.T if transposed else gradient.flatten(1)
            expected = [float((shaped * error).sum()) for error in errors]
            np.testing.assert_allclose(found[unit.name][sample], expected, rtol=2e-4, atol=1e-5)


def test_weights_tied_by_memory_alone_have_the_price_of_tied_ones() -> None:
    tables = []
    for factory in (Tied, TiedByMemory):
        torch.manual_seed(0)
        ids = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(1))
        names = [fmt.name for fmt in FORMATS]
        tables.append(profile(factory(), [ids], names))
    assert tables[0].units == tables[1].units
    np.testing.assert_array_equal(tables[0].kl, tables[1].kl)


class Pooled(nn.Module):
    """A layer that sees positions first: its inputs divide by sample only where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.layer(x.transpose(0, 1).reshape(-1, 8)))
        logits: Tensor = self.head(hidden.view(x.shape[1], len(x), 8).transpose(0, 1))
        return logits


def test_single_samples_do_not_hide_that_inputs_mix_samples() -> None:
    torch.manual_seed(0)
    module = Pooled().requires_grad_(False)
    model = LoadedModel("pooled", module, "float32", Workload(module))
    renderer = Renderer(module, find_units(module))
    pair = torch.randn(2, 3, 8)
    assert not uses_of(model, renderer, list(pair.split(1))).singly  # nothing to see it by
    assert uses_of(model, renderer, [pair]).singly


def test_weights_collect_no_gradient() -> None:
    model = load(Tied)
    renderer = Renderer(model.module, find_units(model.module))
    stream(model, renderer, torch.zeros(2, 3, dtype=torch.long), (lambda z, _: z, lambda *_: None))
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())


class Partly(nn.Module):
    """Two layers, of which one is never called or called behind a detach."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.used, self.idle, self.detached = nn.Linear(4, 4), nn.Linear(4, 4), detached

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.used(x)
        return result + self.idle(x).detach() if self.detached else result


@pytest.mark.parametrize("metric", ["fisher", "salience", "hessian_trace"])
@pytest.mark.parametrize("detached", [False, True])
def test_a_unit_without_a_part_in_the_output_is_named(metric: str, detached: bool) -> None:
    if metric == "salience" and detached:
        pytest.skip("the output error of a layer does not depend on what comes after")
    with pytest.raises(ValueError, match="'idle' takes no part in the model's output"):
        profile(Partly(detached), [torch.ones(2, 4)], ("int2-g32-asym",), metric=metric)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x += self.second(x)
        return x


def test_an_overwritten_input_is_refused_rather_than_priced_wrongly() -> None:
    with pytest.raises(ValueError, match="input of 'second' is overwritten in place"):
        profile(Overwriting(), [torch.ones(2, 4)], ("int2-g32-asym",))


class Positions(nn.Module):
    """Learned positions: one row of ids, shared by all samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = (
            nn.Embedding(20, 8),
            nn.Embedding(6, 8),
            nn.Linear(8, 20),
        )

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1])[None]
        logits: Tensor = self.head(torch.tanh(self.tokens(ids) + self.positions(where)))
        return logits


def test_prices_of_shared_positions_do_not_depend_on_the_batch_size() -> None:
    ids = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = Positions()
    whole, parts = (
        profile(module, batches, ("int2-g32-asym",)) for batches in ([ids], list(ids.split(2)))
    )
    np.testing.assert_allclose(whole.kl, parts.kl, rtol=1e-5)


def test_keyword_arguments_reach_the_hooks() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(input=self.embed(input=ids))
            return logits

    table = profile(Keywords(), [torch.randint(0, 20, (4, 3))] * 2, ("int2-g32-asym",))
    assert (table.kl > 0).all()


@pytest.mark.parametrize("make", [label_upstream, gaussian_upstream])
def test_probe_has_the_fisher_covariance(
    make: Callable[[torch.Generator], Upstream],
) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    upstream = make(torch.Generator().manual_seed(0))
    draws = upstream(logits.expand(4, 20_000, 4), torch.empty(0)).flatten(0, 1)
    p = logits.softmax(-1)
    covariance = draws.T @ draws / len(draws)
    torch.testing.assert_close(covariance, p.diag() - p.outer(p), atol=0.01, rtol=0)
    assert draws.mean(0).abs().max() < 0.01


def test_data_probe_uses_the_next_token() -> None:
    batch: Batch = torch.tensor([[1, 2, 0]])
    upstream = data_upstream(torch.Generator(), is_language_model=True)
    result = upstream(torch.zeros(1, 3, 3), batch)
    third = 1 / 3
    expected = [[third, third, third - 1], [third - 1, third, third], [0, 0, 0]]
    torch.testing.assert_close(result[0], torch.tensor(expected))


@pytest.mark.parametrize("metric", ["fisher", "fisher_gaussian"])
def test_price_is_the_gauss_newton_form(metric: str) -> None:
    """The exact form, dW' F dW / (2 T), lies within 5 standard errors of the estimate."""
    model = load(Tied)
    batches = [
        torch.randint(0, 40, (128, 5), generator=torch.Generator().manual_seed(i)) for i in range(8)
    ]
    table = profile(model, batches, ("int2-g32-asym",), metric=metric, include=["mix"])
    assert table.scores is not None and table.scores.shape == (1024, 1, 1)

    renderer = Renderer(model.module, table.units)
    error = renderer.render("mix", FORMATS[0]) - renderer.weight("mix")
    toy = model.module
    assert isinstance(toy, Tied)

    def logits_of(step: Tensor, ids: Tensor) -> Tensor:
        weight = toy.mix.weight + (step * error).T
        mixed = torch.tanh(toy.embed(ids) @ weight + toy.mix.bias)
        return nn.functional.linear(mixed, toy.head.weight)

    exact = 0.0
    for ids in batches:
        zero = torch.zeros(())
        z, jvp = torch.autograd.functional.jvp(
            lambda step, ids=ids: logits_of(step, ids), zero, torch.ones(())
        )
        p = z.softmax(-1)
        variance = (p * jvp**2).sum(-1) - (p * jvp).sum(-1) ** 2
        exact += float(variance.mean()) / 2 / len(batches)
    assert abs(table.kl[0, 0] - exact) < 5 * table.stderr[0, 0]
    assert table.stderr[0, 0] < 0.1 * table.kl[0, 0]

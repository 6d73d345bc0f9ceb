"""Each metric against its formula, computed the plain way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bitplan.quantizers.format import Format
from bitplan.sensitivity.calibration import samples_from_batches
from bitplan.sensitivity.metrics import METRICS, Scores, Task
from bitplan.sensitivity.models import LoadedModel, Workload
from bitplan.sensitivity.profile import profile
from bitplan.sensitivity.rendering import Renderer
from bitplan.sensitivity.units import find_units

FORMATS = tuple(map(Format.parse, ("int2-g32-asym", "int3-g32", "int8-gc")))


def softmax_regression(batches: int = 4) -> tuple[LoadedModel, list[torch.Tensor]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 6)).requires_grad_(False).eval()
    inputs = [torch.randn(16, 32) for _ in range(batches)]
    return LoadedModel("toy", module, "float32", Workload(module)), inputs


def task(model: LoadedModel, batches: list[torch.Tensor]) -> Task:
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    samples = samples_from_batches(batches, model, "toy", 0)
    return Task(model, units, FORMATS, renderer, samples, 0, lambda _: None)


def errors(work: Task) -> list[torch.Tensor]:
    return [work.renderer.render("0", f) - work.renderer.weight("0") for f in FORMATS]


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_prices_every_format_and_repeats_with_its_seed(name: str) -> None:
    model, batches = softmax_regression(2)
    first, second = (METRICS.get(name)(task(model, batches)) for _ in range(2))
    assert isinstance(first, Scores)
    assert first.values.shape[1:] == (1, len(FORMATS))
    assert np.isfinite(first.values).all()
    np.testing.assert_array_equal(first.values, second.values)
    price = (first.values**2 if first.signed else first.values).mean(0)[0]
    assert price[0] > price[2] > 0, "2 bits must cost more than 8"


def test_weight_mse_is_the_squared_error() -> None:
    work = task(*softmax_regression(1))
    expected = [float(e.square().sum()) for e in errors(work)]
    np.testing.assert_allclose(METRICS.get("weight_mse")(work).values[0, 0], expected, rtol=1e-5)


def test_salience_is_the_output_error() -> None:
    model, batches = softmax_regression()
    work = task(model, batches)
    x = torch.cat(batches)
    expected = [float((x @ e.T).square().sum(1).mean()) for e in errors(work)]
    np.testing.assert_allclose(METRICS.get("salience")(work).values[0, 0], expected, rtol=1e-4)


def test_salience_of_grouped_convolution_and_embedding() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1)).requires_grad_(False)
    model = LoadedModel(
        "toy", module, "float32", Workload(module, logits=lambda y: y.permute(0, 2, 3, 1))
    )
    x = torch.randn(2, 4, 5, 5)
    work = task(model, [x])
    outputs = [
        nn.functional.conv2d(x, e.view(8, 2, 3, 3), padding=1, groups=2) for e in errors(work)
    ]
    expected = [float(y.square().sum()) / (2 * 25) for y in outputs]
    np.testing.assert_allclose(METRICS.get("salience")(work).values[0, 0], expected, rtol=1e-4)

    table = nn.Sequential(nn.Embedding(10, 32)).requires_grad_(False)
    ids = torch.tensor([[1, 1, 4]])
    work = task(LoadedModel("toy", table, "float32", Workload(table)), [ids])
    expected = [float(e[ids[0]].square().sum()) / 3 for e in errors(work)]
    np.testing.assert_allclose(METRICS.get("salience")(work).values[0, 0], expected, rtol=1e-4)


def test_hessian_trace_is_unbiased() -> None:
    """Softmax regression: tr(H) = E[|x|^2 sum_v p_v (1 - p_v)]; the bias is not a unit."""
    model, batches = softmax_regression(32)
    work = task(model, batches)
    values = METRICS.get("hessian_trace")(work).values[:, 0, 0].astype(float)
    x = torch.cat(batches)
    p = model.logits(x)[:, 0].softmax(-1)
    trace = float((x.square().sum(1) * (p * (1 - p)).sum(1)).mean())
    exact = trace / (2 * 32 * 6) * float(errors(work)[0].square().sum())
    stderr = values.std(ddof=1) / len(values) ** 0.5
    assert abs(values.mean() - exact) < 4 * stderr
    assert stderr < 0.2 * exact


def test_gradient_is_the_diagonal_form() -> None:
    model, batches = softmax_regression(1)
    work = task(model, batches)
    values = METRICS.get("gradient")(work).values
    assert values.shape == (16, 1, len(FORMATS))
    x = batches[0]
    # One position per sample and labels y drawn by the probe: g = (p - onehot(y)) x'.
    p = model.logits(x)[:, 0].softmax(-1)
    possible = p.unsqueeze(1) - torch.eye(6)  # [16, label, class]
    squared = torch.einsum("nlc,nd->nlcd", possible**2, x**2)
    prices = torch.einsum("nlcd,cd->nl", squared, errors(work)[0] ** 2) / 2
    closest = (prices - torch.from_numpy(values[:, 0, :1])).abs().min(1).values
    assert closest.max() < 1e-5, "every score belongs to one of the six labels"


def test_scale_of_a_metric_without_units_is_fitted_to_measured_kl() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 6))
    batches = [torch.randn(32, 32) for _ in range(4)]
    formats = ("int2-g32-asym", "int3-g32-asym", "int4-g32-asym", "int5-g32-asym", "int8-gc")
    ratio = {}
    for metric in ("fisher", "weight_mse"):
        table = profile(module, batches, formats, metric=metric)
        ratio[metric] = table.kl[:, 2].sum()
    assert 0.5 < ratio["weight_mse"] / ratio["fisher"] < 2

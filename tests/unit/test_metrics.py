"""Each metric against its formula, computed the plain way."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bitplan.models.workload import LoadedModel, Workload
from bitplan.sensitivity.estimate import profile
from bitplan.sensitivity.metrics import METRICS, Task
from bitplan.sensitivity.probes import label_upstream
from bitplan.tests.toys import FORMATS, softmax_regression, task


def errors(work: Task) -> list[torch.Tensor]:
    return [work.renderer.render("0", f) - work.renderer.weight("0") for f in FORMATS]


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


def test_imatrix_weighs_columns_by_their_inputs() -> None:
    model, batches = softmax_regression()
    work = task(model, batches)
    second = torch.cat(batches).square().mean(0)
    expected = [float((e.square() * second).sum()) for e in errors(work)]
    np.testing.assert_allclose(METRICS.get("imatrix")(work).values[0, 0], expected, rtol=1e-4)


def label_gradients(work: Task) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """x and delta of every sample, with the labels the metric itself draws."""
    generator = torch.Generator().manual_seed(work.seed)
    pairs = []
    for x in work.samples.batches:
        assert isinstance(x, torch.Tensor)
        logits = work.model.logits(x)
        delta = label_upstream(generator)(logits, x)
        pairs += [(x[i], delta[i, 0]) for i in range(len(x))]
    return pairs


def test_gradient_scores_are_their_formulas() -> None:
    work = task(*softmax_regression(6))
    expected: dict[str, list[list[float]]] = {
        name: [] for name in ("fisher_probe", "fisher_diagonal", "fisher_trace", "taylor")
    }
    outputs = []
    for x, delta in label_gradients(work):
        gradient = torch.outer(delta, x)
        expected["fisher_probe"].append(
            [float((gradient * e).sum()) / 2**0.5 for e in errors(work)]
        )
        expected["fisher_diagonal"].append(
            [float((gradient**2 * e**2).sum()) / 2 for e in errors(work)]
        )
        expected["fisher_trace"].append(
            [float(gradient.square().sum() * e.square().mean()) / 2 for e in errors(work)]
        )
        expected["taylor"].append([float((gradient * e).abs().sum()) for e in errors(work)])
        outputs.append([float(((e @ x) * delta).square().sum()) for e in errors(work)])
    for name, values in (*expected.items(), ("output_fisher", outputs)):
        found = METRICS.get(name)(work).values[:, 0]
        np.testing.assert_allclose(found, values, rtol=1e-3, atol=1e-7, err_msg=name)


def test_output_fisher_of_grouped_convolution_and_embedding() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1)).requires_grad_(False)
    model = LoadedModel(
        "toy", module, "float32", Workload(module, logits=lambda y: y.permute(0, 2, 3, 1))
    )
    x = torch.randn(2, 4, 5, 5)
    work = task(model, [x])
    delta = label_upstream(torch.Generator().manual_seed(work.seed))(model.logits(x), x)
    upstream = delta.view(2, 5, 5, 8).permute(0, 3, 1, 2)
    for f, error in enumerate(errors(work)):
        change = nn.functional.conv2d(x, error.view(8, 2, 3, 3), padding=1, groups=2)
        expected = (change * upstream).square().sum((1, 2, 3)) / 25
        found = METRICS.get("output_fisher")(work).values[:, 0, f]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3)

    table = nn.Sequential(nn.Embedding(10, 32)).requires_grad_(False)
    ids = torch.tensor([[1, 1, 4], [0, 9, 9]])
    work = task(LoadedModel("toy", table, "float32", Workload(table)), [ids])
    delta = label_upstream(torch.Generator().manual_seed(work.seed))(work.model.logits(ids), ids)
    for f, error in enumerate(errors(work)):
        expected = (error[ids] * delta).square().sum((1, 2)) / 3
        found = METRICS.get("output_fisher")(work).values[:, 0, f]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3)

"""Whole models of many architectures: covered, priced, packed, written, loaded, and the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bitplan.jobs.materialize import apply, assignment_formats, load_packed, quantize
from bitplan.models.coverage import Coverage
from bitplan.models.load import load_model
from bitplan.models.rendering import Renderer
from bitplan.models.workload import LoadedModel, take
from bitplan.quantizers.format import Format
from bitplan.search.plan import Plan
from bitplan.search.solve import solve
from bitplan.sensitivity.estimate import profile
from bitplan.sensitivity.probes import label_upstream
from bitplan.sensitivity.table import SensitivityTable

from .architectures import ARCHITECTURES

FILE = Path(__file__).parent / "architectures.py"
FORMATS = ("int2-g32-asym", "int4-g32", "int8-gc", "bf16")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def priced(request: pytest.FixtureRequest) -> Iterator[tuple[LoadedModel, SensitivityTable]]:
    model = load_model(f"{FILE}:{request.param}", "cpu")
    yield model, profile(model, list(model.workload.calibration), FORMATS, metric="fisher_probe")


def plan_of(table: SensitivityTable) -> Plan:
    size = table.bytes.min(axis=1).sum() + table.bytes.max(axis=1).sum()
    return solve(table, f"{size // 3}B")


def test_every_weight_is_planned(priced: tuple[LoadedModel, SensitivityTable]) -> None:
    model, table = priced
    coverage = Coverage.from_json(table.provenance.coverage or {})
    weights = {id(p): p.numel() for p in model.module.parameters() if p.dim() > 1}
    assert coverage.weights == sum(weights.values())
    assert coverage.planned == table.weights == coverage.weights


def test_scores_are_products_with_the_gradients_of_autograd(
    priced: tuple[LoadedModel, SensitivityTable],
) -> None:
    model, table = priced
    assert table.scores is not None
    assert not (table.provenance.coverage or {})["unreached"]
    renderer = Renderer(model.module, table.units)
    formats = [Format.parse(name) for name in table.formats]
    errors = {
        name: torch.stack([renderer.render(name, f) - renderer.weight(name) for f in formats])
        for name in renderer.names
    }
    parameters = {name: renderer.place(name).parameter for name in renderer.names}
    upstream = label_upstream(torch.Generator().manual_seed(0))
    samples = [(batch, i) for batch in model.workload.calibration for i in (0, 1)]
    expected = np.zeros_like(table.scores)
    for n, (batch, i) in enumerate(samples):
        sample = take(batch, i, i + 1)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        logits = model.logits(sample)
        gradients = torch.autograd.grad(
            logits, list(parameters.values()), upstream(logits.detach(), sample), allow_unused=True
        )
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:  # None of an expert that this sample does not reach
                unit = next(u for u, unit in enumerate(table.units) if name in unit.modules)
                matrix = renderer.place(name).matrix(gradient)
                product = torch.einsum("frc,rc->f", errors[name].double(), matrix.double())
                expected[n, unit] += product.numpy() / np.sqrt(2 * logits.shape[1])
    size = np.abs(expected).max(axis=(0, 2), keepdims=True)
    np.testing.assert_allclose(table.scores / size, expected / size, atol=2e-4)


def test_packed_models_are_their_dequantized_ones(
    priced: tuple[LoadedModel, SensitivityTable], tmp_path: Path
) -> None:
    model, table = priced
    plan = plan_of(table)
    assert len(set(plan.assignments.values())) > 1
    batches = model.workload.calibration
    renderer = Renderer(model.module, table.units)
    with torch.no_grad():
        original = [model.logits(batch) for batch in batches]
        with renderer.applied(assignment_formats(plan)):
            expected = [model.logits(batch) for batch in batches]
        again = [model.logits(batch) for batch in batches]
        loaded = load_packed(quantize(plan, tmp_path / "packed", model), tokenizer=False)
        from_file = [loaded.logits(batch) for batch in batches]
        apply(model.module, plan)
        in_place = [model.logits(batch) for batch in batches]
    for i, plain in enumerate(expected):
        assert torch.equal(original[i], again[i])
        scale = float(plain.abs().max())
        assert float((plain - original[i]).abs().max()) > 1e-4 * scale
        torch.testing.assert_close(in_place[i], plain, rtol=0, atol=2e-5 * scale)
        torch.testing.assert_close(from_file[i], plain, rtol=0, atol=2e-5 * scale)

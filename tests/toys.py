"""A toy model whose metrics have closed forms."""

from __future__ import annotations

import torch
from torch import nn

from bitplan.models.find import find_units
from bitplan.models.rendering import Renderer
from bitplan.models.samples import samples_from_batches
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.sensitivity.metrics import Task

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

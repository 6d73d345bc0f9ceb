"""Models and files that do not fit the streaming of weights are noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitplan.models import together
from bitplan.models.blockwise import BlockwisePass
from bitplan.models.borders import Borders
from bitplan.models.find import find_units
from bitplan.models.measure import measure, plan_runner
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, samples_from_batches
from bitplan.models.together import measure_together
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.sensitivity.factors import Gradient
from bitplan.sensitivity.reading import UsesReader


class Reading(nn.Module):
    """Block of a model in which a later block reads what an earlier one has left."""

    def __init__(self, number: int, how: str) -> None:
        super().__init__()
        self.linear, self.number, self.how = nn.Linear(16, 16), number, how
        self.cut = False

    def forward(self, hidden: Tensor, parent: Any, values: dict[str, Tensor]) -> Tensor:
        changed: Tensor = hidden + self.linear(hidden).tanh()
        if self.cut:
            changed = changed.detach()
        if self.number == 4:
            parent[0].left = values["left"] = changed.mean(1, keepdim=True)
        if self.number == 5 and self.how != "nothing":
            left = parent[0].left if self.how == "attribute" else values["left"]
            changed = changed + left.tanh()
        return changed


class Model(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24)
        self.layers = nn.ModuleList(Reading(i, how) for i in range(7))
        self.left: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        hidden, values = self.embed(ids), {}
        for layer in self.layers:
            hidden = layer(hidden, [self], values)
        logits: Tensor = self.head(hidden)
        return logits


def toy(how: str, batches: int) -> tuple[LoadedModel, Samples, Renderer]:
    torch.manual_seed(0)
    module = Model(how).requires_grad_(False).eval()
    model = LoadedModel("toy", module, "float32", Workload(module))
    ids = torch.randint(0, 24, (batches, 6)).split(1)
    samples = samples_from_batches(list(ids), model, "toy", 0)
    return model, samples, Renderer(module, find_units(module))


def blockwise(model: LoadedModel, samples: Samples, renderer: Renderer) -> BlockwisePass[Gradient]:
    reader = UsesReader(model, renderer, samples)
    return BlockwisePass(model, renderer, find_units(model.module), samples, reader, limit=0)


@pytest.mark.parametrize("batches", [3, 1])
@pytest.mark.parametrize("how", ["nothing", "attribute", "values"])
def test_what_a_block_reads_of_an_earlier_one_is_noticed(how: str, batches: int) -> None:
    model, samples, renderer = toy(how, batches)
    plan = dict.fromkeys(renderer.names, Format.parse("int2-g32"))
    expected, _ = measure(model, {"plan": plan_runner(model, renderer, plan)}, samples)
    found, _ = measure_together(model, {"plan": (renderer, plan)}, samples)
    assert np.allclose(found["plan"].kl, expected["plan"].kl, rtol=1e-5)
    prefix = together._prefix(model, {"plan": (renderer, plan)}, samples)
    assert len(prefix.blocks) == (7 if how == "nothing" else 0)


def test_a_state_is_put_in_place_of_all_of_another() -> None:
    kept, state = Borders(limit=0), torch.arange(8.0)
    kept.put(0, (state, None))
    kept.put(0, state)
    assert kept.get(0)[1] is None, "a tensor, and no tuple"
    kept.drop(0)
    assert 0 not in kept
    kept.put(0, state + 1)
    assert 0 in kept and torch.equal(kept.get(0)[0], state + 1) and kept._end == state.nbytes


def test_below_a_block_that_does_not_read_its_input_gradients_are_zero() -> None:
    model, samples, renderer = toy("nothing", 2)
    passes = blockwise(model, samples, renderer)
    assert passes.is_blockwise
    model.module.get_submodule("layers.3").cut = True  # not when it was tried out
    sizes: dict[str, float] = {}

    def visit(name: str, gradient: Gradient, _: range) -> None:
        if name.startswith("layers."):
            sizes[name] = sizes.get(name, 0) + float(gradient.gradient(slice(None)).abs().sum())

    passes.backward((lambda logits, _: torch.randn_like(logits), visit))
    assert sizes["layers.4.linear"] > 0
    assert not any(sizes.get(f"layers.{i}.linear") for i in range(4))


def test_a_model_that_fails_is_not_taken_to_run_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples, renderer = toy("nothing", 2)
    passes = blockwise(model, samples, renderer)

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("it fails")

    monkeypatch.setattr(passes._reader, "stream", fail)
    assert not passes.is_blockwise

"""Shards of samples: every sample once, in order, and sums that add up to the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitplan.models.find import find_units
from bitplan.models.passes import Inputs
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, samples_from_batches
from bitplan.models.workload import LoadedModel, Workload, samples_in
from bitplan.sensitivity.factors import Gradient
from bitplan.sensitivity.reading import whole_pass

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)
forms = st.sampled_from(["tensor", "tuple", "dict", "lengths"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        result: Tensor = self.down(torch.tanh(self.up(x if y is None else x + y)))
        return result


def network() -> LoadedModel:
    torch.manual_seed(0)
    module = Net().requires_grad_(False).eval()
    return LoadedModel("net", module, "float32", Workload(module))


def numbered(model: LoadedModel, counts: list[int], form: str) -> Samples:
    """Batches of random inputs whose first entry is the number of the sample."""
    generator = torch.Generator().manual_seed(sum(counts))
    batches: list[Any] = []
    first = 0
    for i, count in enumerate(counts):
        x = torch.randn(count, 3 + i % 2 if form == "lengths" else 3, 4, generator=generator)
        x[:, 0, 0] = torch.arange(first, first + count)
        y = torch.randn(x.shape, generator=generator)
        batches.append({"tuple": (x, y), "dict": {"x": x, "y": y}}.get(form, x))
        first += count
    return samples_from_batches(batches, model, "toy", 0)


def numbers(samples: Samples) -> list[int]:
    found: list[int] = []
    for batch in samples.batches:
        values: Any = list(batch.values()) if isinstance(batch, dict) else batch
        x = values if isinstance(values, Tensor) else values[0]
        found += x[:, 0, 0].int().tolist()
    return found


@given(sizes, forms, st.integers(1, 4))
def test_every_sample_is_in_one_shard_in_order(counts: list[int], form: str, shards: int) -> None:
    samples = numbered(network(), counts, form)
    used = min(shards, samples.count)
    parts = [samples.shard(i, used) for i in range(used)]
    for i, part in enumerate(parts):
        assert numbers(part) == list(range(i, samples.count, used))
        assert part.count == len(numbers(part))
        assert max(map(samples_in, part.batches)) <= max(map(samples_in, samples.batches))
    assert len({part.sha256 for part in parts} | {samples.sha256}) == (used + 1 if used > 1 else 1)
    if form == "tensor" and used > 1:  # one shard is the samples as they are
        most = max(counts)
        assert [len(part.batches) for part in parts] == [-(-part.count // most) for part in parts]


@settings(max_examples=25, deadline=None)
@given(sizes, forms, st.integers(2, 4))
def test_sums_over_shards_are_the_whole(counts: list[int], form: str, shards: int) -> None:
    model = network()
    samples = numbered(model, counts, form)
    used = min(shards, samples.count)
    whole = sums_of(model, samples)
    parts = [sums_of(model, samples.shard(i, used)) for i in range(used)]
    for name, total in whole.items():
        added = np.sum([part[name] for part in parts], axis=0)
        np.testing.assert_allclose(added, total, rtol=1e-4, atol=1e-4)


def sums_of(model: LoadedModel, samples: Samples) -> dict[str, Any]:
    """Input moments, squared per-sample gradients and positions, summed over samples."""
    units = find_units(model.module)
    passes = whole_pass(model, Renderer(model.module, units), units, samples)
    sums: dict[str, Any] = {}

    def moments(inputs: Inputs) -> None:
        rows, key = inputs.x.flatten(0, 2).double(), f"{inputs.name} moments"
        sums[key] = sums.get(key, 0.0) + (rows.T @ rows).numpy()

    def gradients(name: str, gradient: Gradient, _samples: range) -> None:
        squares = gradient.gradient(slice(None)).double().square().sum(0)
        sums[f"{name} gradients"] = sums.get(f"{name} gradients", 0.0) + squares.numpy()

    def upstream(logits: Tensor, _batch: Any) -> Tensor:
        return logits.softmax(-1)

    sums["positions"] = [
        passes.forward(moments).sum(),
        passes.backward((upstream, gradients)).sum(),
    ]
    return sums


def test_one_shard_is_the_whole_and_others_must_exist() -> None:
    samples = numbered(network(), [2, 1], "tensor")
    assert samples.shard(0, 1) is samples
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=rf"no shard {index} of {count}"):
            samples.shard(index, count)
    with pytest.raises(ValueError, match="Shard 3 of 5 is empty: there are only 3 samples"):
        samples.shard(3, 5)

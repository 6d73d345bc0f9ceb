"""The gradient and curvature of the KL at a quantized model, against autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bitplan.models.find import find_units
from bitplan.models.rendering import Renderer
from bitplan.models.samples import samples_from_batches
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.sensitivity.linearize import linearize

FORMATS = tuple(Format.parse(name) for name in ("int2-gc-asym", "int4-gc", "bf16"))


class Small(nn.Module):
    """Embedding, a convolution-free two-layer network and a head that is tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x)  # type: ignore[no-any-return]


def loaded() -> LoadedModel:
    torch.manual_seed(3)
    module = Small().requires_grad_(False).eval()
    return LoadedModel("small", module, "float32", Workload(module))


def quantized(model: LoadedModel, renderer: Renderer, choice: list[int]) -> LoadedModel:
    """A copy whose weights really are the rendered ones."""
    module = Small().eval()
    module.load_state_dict(model.module.state_dict())
    layers = dict(module.named_modules())
    for name, f in zip(renderer.names, choice, strict=True):
        layers[name].weight.data = renderer.render(name, FORMATS[f]).clone()
    return LoadedModel("copy", module, "float32", Workload(module))


def kl(p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - logits.log_softmax(-1))).sum()


def test_first_order_is_the_gradient_of_the_kl_of_the_quantized_model() -> None:
    model = loaded()
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    choice = [0, 0, 1, 0]
    ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
    samples = samples_from_batches([ids[:2], ids[2:]], model, "test", 0)
    found = linearize(model, renderer, units, FORMATS, np.array(choice), samples, seed=0)

    copy = quantized(model, renderer, choice)
    layers = dict(copy.module.named_modules())
    for i in range(3):
        p = model.logits(ids[i : i + 1]).log_softmax(-1)
        copy.module.zero_grad()
        (kl(p, copy.logits(ids[i : i + 1])) / 7).backward()
        for u, name in enumerate(renderer.names):
            gradient = layers[name].weight.grad
            assert isinstance(gradient, torch.Tensor)
            current = renderer.render(name, FORMATS[choice[u]])
            expected = [
                float((gradient * (renderer.render(name, fmt) - current)).sum()) for fmt in FORMATS
            ]
            np.testing.assert_allclose(found.first[i, u], expected, rtol=2e-3, atol=1e-6)


def test_second_order_is_the_curvature_of_the_quantized_model() -> None:
    """Averaged over many label draws, the probe gives KL(q || q') of a small step to order two."""
    model = loaded()
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    choice = np.array([1, 1, 1, 1])
    ids = torch.randint(11, (1, 7), generator=torch.Generator().manual_seed(0))
    many = samples_from_batches([ids.expand(4000, 7)], model, "test", 0)
    found = linearize(model, renderer, units, FORMATS, choice, many, seed=0)

    base = quantized(model, renderer, choice.tolist()).module.double()
    p = base(ids).log_softmax(-1).detach()
    for u, name in enumerate(renderer.names):
        step = renderer.render(name, FORMATS[2]) - renderer.render(name, FORMATS[1])
        moved = quantized(model, renderer, choice.tolist()).module.double()
        dict(moved.named_modules())[name].weight.data += 0.05 * step
        exact = float(kl(p, moved(ids).detach())) / 7 / 0.05**2
        values = found.second[:, u, 2].astype(float) ** 2
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - exact) < 4 * error + 0.05 * exact


def test_the_diagonal_counts_errors_from_the_plan() -> None:
    model = loaded()
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    choice = np.array([2, 2, 2, 2])
    samples = samples_from_batches([torch.arange(10)[None] % 11], model, "test", 0)
    found = linearize(model, renderer, units, FORMATS, choice, samples, seed=1)
    assert (found.diagonal[:, 2] == 0).all() and (found.diagonal[:, 0] > 0).all()
    assert (found.first[:, :, 2] == 0).all() and (found.second[:, :, 2] == 0).all()


def test_the_model_is_as_before_and_the_seed_decides() -> None:
    model = loaded()
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    samples = samples_from_batches([torch.arange(10)[None] % 11], model, "test", 0)
    runs = [
        linearize(model, renderer, units, FORMATS, np.zeros(4, np.intp), samples, seed)
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(before[k], v) for k, v in model.module.state_dict().items())
    assert np.array_equal(runs[0].second, runs[1].second)
    assert not np.array_equal(runs[0].second, runs[2].second)
    assert np.array_equal(runs[0].first, runs[2].first)

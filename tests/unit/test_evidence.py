"""Second moments of inputs: who has them, who shares them, and that they are right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitplan._base.progress import Reporter
from bitplan.models.find import find_units
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, calibration_samples, samples_from_batches
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.methods import Evidence
from bitplan.sensitivity.evidence import Moments, calibrated


class Net(nn.Module):
    """Convolutions of three kinds, then two heads on the same vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2)
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(self.depthwise(self.plain(x)))).mean((2, 3))
        return torch.cat([self.left(x), self.right(x)], 1)


def images() -> tuple[LoadedModel, Samples]:
    torch.manual_seed(0)
    module = Net().requires_grad_(False).eval()
    model = LoadedModel("net", module, "float32", Workload(module))
    return model, samples_from_batches([torch.randn(5, 3, 9, 9) for _ in range(2)], model, "x", 0)


def gathered(
    model: LoadedModel, samples: Samples, limit: int = 1 << 30
) -> list[dict[str, Evidence]]:
    renderer = Renderer(model.module, find_units(model.module))
    moments = Moments(model, renderer, lambda: samples, "key", limit=limit)
    return [dict(found) for found in moments.gather(renderer.names)]


def test_moments_are_those_of_what_each_output_channel_multiplies() -> None:
    model, samples = images()
    net, x = model.module, torch.cat([b for b in samples.batches if isinstance(b, Tensor)])
    (found,) = gathered(model, samples)
    assert isinstance(net, Net)
    inputs = {"plain": x, "depthwise": net.plain(x), "grouped": net.depthwise(net.plain(x))}
    for name, given in inputs.items():
        module = net.get_submodule(name)
        assert isinstance(module, nn.Conv2d)
        hessian = found[name].hessian
        assert hessian is not None
        assert hessian.shape[0] == module.groups
        # mean square of the outputs without bias = w H w^T, channel by channel
        assert module.bias is not None
        output = module(given) - module.bias[:, None, None]
        expected = output.square().mean((0, 2, 3))
        rows = module.weight.flatten(1).unflatten(0, (module.groups, -1))
        assert torch.allclose(((rows @ hessian) * rows).sum(-1).flatten(), expected, rtol=1e-4)
    assert found["left"] is found["right"]


def test_moments_of_a_language_model(tiny: LoadedModel) -> None:
    samples = calibration_samples(tiny, sequences=6, length=32, batch_tokens=64)
    (lookups, found) = gathered(tiny, samples)
    assert lookups == {"model.embed_tokens": Evidence()}  # tied to the output layer
    layer = "model.layers.1."
    names = ("q_proj", "k_proj", "v_proj")
    assert len({id(found[f"{layer}self_attn.{name}"]) for name in names}) == 1
    assert found[f"{layer}mlp.gate_proj"] is found[f"{layer}mlp.up_proj"]
    assert len({id(evidence) for evidence in found.values()}) == 4 * 2
    inputs: list[Tensor] = []
    down = tiny.module.get_submodule(f"{layer}mlp.down_proj")
    handle = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for batch in samples.batches:
        tiny.logits(batch)
    handle.remove()
    x = torch.cat(inputs)
    hessian = found[f"{layer}mlp.down_proj"].hessian
    assert hessian is not None
    assert torch.allclose(hessian[0], x.T @ x / len(x), rtol=1e-3, atol=1e-5)


def test_batches_do_not_matter_and_few_matrices_at_a_time_give_the_same(tiny: LoadedModel) -> None:
    one = calibration_samples(tiny, sequences=6, length=32, batch_tokens=32)
    (_, whole) = gathered(tiny, calibration_samples(tiny, sequences=6, length=32))
    pieces = gathered(tiny, one, limit=100_000)
    assert len(pieces) > 3
    assert sum(len(some) for some in pieces) == len(whole) + 1
    for some in pieces[1:]:
        for name, evidence in some.items():
            expected = whole[name].hessian
            assert evidence.hessian is not None and expected is not None
            assert torch.equal(evidence.hessian, expected)


def test_a_renderer_gets_what_its_method_needs(tiny: LoadedModel) -> None:
    units, samples = find_units(tiny.module), calibration_samples(tiny, sequences=4, length=32)

    def make(rounding: str, sha256: str = "a") -> Renderer:
        seen = replace(samples, sha256=sha256)
        return calibrated(tiny, units, rounding, seen, model_sha256="b")

    assert make("rtn").store.evidence is None
    first, second = make("gptq").store.evidence, make("gptq", "c").store.evidence
    assert first is not None and second is not None
    assert first.key != second.key


def test_an_input_that_overflows_is_named() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    module = nn.Sequential(first, second).requires_grad_(False).eval()
    first.bias.fill_(1e30)
    second.weight.fill_(1e-30)
    model = LoadedModel("big", module, "float32", Workload(module))
    samples = samples_from_batches([torch.randn(3, 4)], model, "x", 0)
    renderer = Renderer(module, find_units(module), "gptq")
    renderer.store.evidence = Moments(model, renderer, lambda: samples, "", Reporter(quiet=True))
    with pytest.raises(ValueError, match="input of '1' has NaN or Inf"):
        renderer.fit([])
        list(renderer.store.evidence.gather(["1"]))

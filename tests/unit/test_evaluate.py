"""KL, perplexity and pairing against the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitplan.models.find import find_units
from bitplan.models.measure import Measurement, measure, plan_runner
from bitplan.models.rendering import Renderer
from bitplan.models.samples import evaluation_samples
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format


def test_kl_and_perplexity(tiny: LoadedModel) -> None:
    samples = evaluation_samples(tiny, tokens=96, length=16, batch_tokens=48)
    units = find_units(tiny.module)
    renderer = Renderer(tiny.module, units)
    plan = {name: Format.parse("int3-g32-asym") for name in renderer.names}
    before = {name: renderer.weight(name).clone() for name in renderer.names}
    steps = []
    measured, ppl = measure(
        tiny, {"plan": plan_runner(tiny, renderer, plan)}, samples, lambda: steps.append(1)
    )
    assert len(steps) == 4
    assert all(torch.equal(renderer.weight(n), w) for n, w in before.items()), "put back"

    ids = torch.cat(list(samples.batches))  # type: ignore[arg-type]
    with torch.no_grad():
        p = tiny.logits(ids).double().log_softmax(-1)
        for name in renderer.names:
            renderer.weight(name).copy_(renderer.render(name, plan[name]))
        q = tiny.logits(ids).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    np.testing.assert_allclose(measured["plan"].kl, kl, rtol=1e-4)
    nll = F.cross_entropy(p[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert ppl == pytest.approx(float(np.exp(nll)), rel=1e-5)
    assert measured["plan"].tokens == 96


def test_embedding_lookup_renders_the_same_rows(tiny: LoadedModel) -> None:
    renderer = Renderer(tiny.module, find_units(tiny.module))
    name = "model.embed_tokens"
    fmt = Format.parse("int2-g32-asym")
    whole = renderer.render(name, fmt)
    rows = torch.tensor([5, 1, 400])
    torch.testing.assert_close(renderer.render(name, fmt, rows), whole[rows], rtol=0, atol=0)


def test_paired_difference_cancels_what_is_common() -> None:
    noise = np.random.default_rng(0).normal(size=100)
    a = Measurement(noise + 1.0, None, 100)
    b = Measurement(noise, None, 100)
    difference, stderr = a.minus(b)
    assert difference == 1.0
    assert stderr < 1e-12 < a.kl_stderr
    assert a.perplexity is None


def test_an_interrupt_inside_a_forward_pass_puts_the_weights_back(tiny: LoadedModel) -> None:
    renderer = Renderer(tiny.module, find_units(tiny.module))
    name = "model.layers.1.mlp.up_proj"
    before = renderer.weight(name).clone()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    module = tiny.module.get_submodule("model.layers.1.mlp.up_proj")
    plan = dict.fromkeys(renderer.names, Format.parse("int2-g32-asym"))
    with pytest.raises(KeyboardInterrupt), renderer.applied(plan):
        module.register_forward_pre_hook(interrupt)
        tiny.logits(torch.zeros(1, 4, dtype=torch.long))
    assert torch.equal(renderer.weight(name), before)

"""What stands for a weight while a plan is in force."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitplan.models.find import find_units
from bitplan.models.lazy import LazyWeight
from bitplan.models.rendering import Renderer
from bitplan.quantizers.format import Format

FORMAT = Format.parse("int4-gc")


class LoopedExperts(nn.Module):
    """Experts that a loop reads in turn, two weights of each."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for i in range(self.num_experts):
            result = result + torch.relu(x @ self.up[i].T) @ self.down[i].T
        return result


def test_a_loop_over_a_lazy_weight_ends() -> None:
    weight = torch.randn(4, 3, 2)
    lazy = LazyWeight(weight.shape, weight, lambda: weight, lambda rows: weight[rows])
    assert torch.equal(
        torch.stack([entry for _, entry in zip(range(9), lazy, strict=False)]), weight
    )
    assert torch.equal(lazy[-1], weight[-1])
    for index in (4, -5):
        with pytest.raises(IndexError, match="4"):
            lazy[index]


def test_an_error_while_rendering_is_no_original_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    renderer = Renderer(module, find_units(module))

    def broken(*_: Any) -> Tensor:
        raise AttributeError("no such part")

    monkeypatch.setattr(renderer, "assembled", broken)
    with (
        torch.no_grad(),
        renderer.applied({"0": FORMAT}),
        pytest.raises(RuntimeError, match="'weight' of a Linear failed: no such part"),
    ):
        module(torch.randn(2, 8))


def test_experts_read_in_turn_are_rendered_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = LoopedExperts().requires_grad_(False)
    renderer = Renderer(module, find_units(module))
    x, rendered = torch.randn(5, 4), Counter[str]()
    plain = LoopedExperts().requires_grad_(False)
    for name in ("up", "down"):
        parameter = getattr(plain, name)
        parameter.copy_(renderer.render(name, FORMAT).view(parameter.shape))
    render = renderer.render

    def counted(name: str, *args: Any) -> Tensor:
        result = render(name, *args)
        rendered[name] += result.numel()
        return result

    monkeypatch.setattr(renderer, "render", counted)
    with torch.no_grad(), renderer.applied({"up": FORMAT, "down": FORMAT}):
        found = module(x)
    assert torch.allclose(found, plain(x), atol=1e-6)
    assert rendered == {"up": module.up.numel(), "down": module.down.numel()}

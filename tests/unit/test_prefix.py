"""Passes from a border between blocks: blocks found, states kept, models that do not allow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitplan.models.find import find_units
from bitplan.models.prefix import Prefix, blocks_by_count, blocks_of
from bitplan.models.workload import LoadedModel, Workload, take


class Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.form = form
        self.runs = 0

    def forward(self, hidden: Any) -> Any:
        self.runs += 1
        hidden = hidden["hidden"] if isinstance(hidden, dict) else hidden
        if self.form == "in place":
            return hidden.add_(self.linear(hidden).tanh())
        hidden = hidden + self.linear(hidden).tanh()
        return {"tuple": (hidden, None), "dict": {"hidden": hidden}}.get(self.form, hidden)


class Stack(nn.Module):
    """Four blocks between a stem and a head, written in several ways."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(form) for _ in range(4))
        self.head = nn.Linear(8, 3)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        hidden = first = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
            hidden = hidden[0] if self.form == "tuple" else hidden
            if self.form == "memory" and block is self.blocks[0]:
                first = hidden
        if self.form == "again":
            hidden = self.blocks[0](hidden)
        if self.form == "memory":
            hidden = hidden + first
        logits: Tensor = self.head(hidden["hidden"] if self.form == "dict" else hidden)
        return logits


def stack(form: str = "plain") -> tuple[LoadedModel, Prefix, Tensor]:
    torch.manual_seed(0)
    module = Stack(form).requires_grad_(False).eval()
    model = LoadedModel("stack", module, "float32", Workload(module))
    return model, Prefix(blocks_of(module, find_units(module)).values()), torch.randn(3, 5, 8)


def runs(model: LoadedModel) -> list[int]:
    return [block.runs for block in model.module.blocks]  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["plain", "tuple", "dict", "in place"])
def test_a_pass_from_any_border_gives_the_same_logits(form: str) -> None:
    model, prefix, batch = stack(form)
    logits, states = prefix.run(model.logits, batch, keep=range(1, 5))
    assert torch.equal(logits, model.logits(batch)) and list(states) == [1, 2, 3, 4]
    for start in range(1, 5):
        before = runs(model)
        again, found = prefix.run(model.logits, batch, states, start, keep=(2, 4))
        assert torch.equal(again, logits)
        assert list(found) == [border for border in (2, 4) if border > start]
        ran = [b - a for a, b in zip(before, runs(model), strict=True)]
        assert ran == [0] * start + [1] * (4 - start)
    assert not any("forward" in vars(module) for module in model.module.modules())


@pytest.mark.parametrize("form", ["plain", "tuple", "in place", "dict", "memory", "again"])
def test_whether_blocks_can_be_skipped_is_tried_out(form: str) -> None:
    model, prefix, batch = stack(form)
    if form == "again":
        prefix.trace(model.logits, batch)
    else:
        prefix.can_skip(model.logits, batch, range(1, 5))
    assert bool(prefix.blocks) == (form in {"plain", "tuple", "in place"})


def test_known_states_serve_models_that_look_back() -> None:
    """Each skipped block gives its own output where that is known, so nothing is missing."""
    model, prefix, batch = stack("memory")
    logits, states = prefix.run(model.logits, batch, keep=range(1, 5))
    assert torch.equal(prefix.run(model.logits, batch, states, 3)[0], logits)
    assert not torch.equal(prefix.run(model.logits, batch, {3: states[3]}, 3)[0], logits)


def test_states_of_blocks_that_run_twice_are_not_kept() -> None:
    model, prefix, batch = stack("again")
    assert prefix.run(model.logits, batch, keep=range(1, 5))[1] == {}


def test_a_pass_stops_at_a_border_with_the_state_there() -> None:
    model, prefix, batch = stack()
    _, states = prefix.run(model.logits, batch, keep=range(1, 5))
    before = runs(model)
    assert prefix.until(model.logits, batch, {}, 0, 0) is None
    assert torch.equal(prefix.until(model.logits, batch, {}, 0, 1), states[1])
    assert torch.equal(prefix.until(model.logits, batch, {1: states[1]}, 1, 3), states[3])
    assert [b - a for a, b in zip(before, runs(model), strict=True)] == [1, 1, 1, 0]
    assert not any(module._forward_hooks for module in model.module.modules())


def test_a_trace_says_where_modules_are_used() -> None:
    model, prefix, batch = stack()
    names = ["stem", "blocks.0.linear", "blocks.3.linear", "head"]
    trace = prefix.trace(model.logits, batch, [(n, model.module.get_submodule(n)) for n in names])
    assert trace.steps == dict(zip(names, ([0], [1], [4], [5]), strict=True))
    assert trace.state_bytes == 3 * 5 * 8 * 4


def test_blocks_are_found_by_units_or_by_their_number() -> None:
    model, _, _ = stack()
    expected = {f"blocks.{i}": model.module.get_submodule(f"blocks.{i}") for i in range(4)}
    assert blocks_of(model.module, find_units(model.module)) == expected
    assert blocks_by_count(model.module, 4) == expected
    assert blocks_by_count(model.module, 3) == {}
    assert blocks_of(model.module, find_units(model.module, include=("head",))) == {}


def test_samples_are_taken_from_every_kind_of_batch() -> None:
    x, y = torch.arange(5), torch.arange(5) * 10
    shared = torch.arange(3)
    assert torch.equal(as_tensor(take(x, 1, 5, 2)), torch.tensor([1, 3]))
    taken = take({"x": x, "flag": True, "shared": shared}, 0, 2)
    assert isinstance(taken, dict)
    assert torch.equal(taken["x"], x[:2]) and taken["flag"] and taken["shared"] is shared
    pair = take((x, y), 4, 5)
    assert isinstance(pair, tuple) and [part.tolist() for part in pair] == [[4], [40]]


def as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value

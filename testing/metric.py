"""What every sensitivity metric promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from ..sensitivity.metrics import METRICS, Metric, Scores, Task
from .contract import Contract
from .toys import FORMATS, measured_kl, toy_model, toy_task

NATS = 1.7  # a metric in nats is off by no more than this factor, on the whole toy


def prices(scores: Scores) -> NDArray[np.float64]:
    """Float64 [U, F], what a table holds before noise is shrunk and scales are fitted."""
    values = scores.values.astype(np.float64)
    mean: NDArray[np.float64] = (values**2 if scores.signed else values).mean(axis=0)
    return mean


class MetricContract(Contract):
    """A price per unit and format: finite, repeatable, and the larger the worse the format."""

    @pytest.fixture
    def task(self) -> Task:
        """Four units of four kinds, a tied one among them, at 2, 4 and 8 bits."""
        return toy_task()

    def plugin(self, name: str) -> Metric:
        """The metric."""
        return METRICS.get(name)

    def test_prices_every_unit_in_every_format(self, name: str, task: Task) -> None:
        """Per sample or at once, as :class:`Scores` says."""
        scores = self.plugin(name)(task)
        assert 1 <= len(scores.values) <= task.samples.count
        assert scores.values.shape[1:] == (len(task.units), len(task.formats))
        assert np.isfinite(scores.values).all()
        assert scores.signed or (scores.values >= 0).all()
        if scores.diagonal is not None:
            assert scores.signed
            assert scores.diagonal.shape == scores.values.shape[1:]
            assert (scores.diagonal >= 0).all()

    def test_fewer_bits_cost_more_in_every_unit(self, name: str, task: Task) -> None:
        """From 2 to 8 bits the squared error falls by more than a thousand."""
        found = prices(self.plugin(name)(task))
        assert (found[:, :-1] > 2 * found[:, 1:]).all()
        assert (found > 0).all()

    def test_repeats_with_its_seed(self, name: str, task: Task) -> None:
        """Bit for bit."""
        first, second = (self.plugin(name)(task) for _ in range(2))
        np.testing.assert_array_equal(first.values, second.values)

    def test_formats_are_priced_each_for_itself(self, name: str) -> None:
        """In whatever order they come."""
        forward = prices(self.plugin(name)(toy_task(FORMATS)))
        backward = prices(self.plugin(name)(toy_task(FORMATS[::-1])))
        np.testing.assert_allclose(forward, backward[:, ::-1], rtol=1e-4)

    def test_what_changes_no_weight_costs_nothing(self, name: str) -> None:
        """Float32 changes no matrix; bfloat16 changes all but the one it holds exactly."""
        model = toy_model()
        layer = model.module.get_submodule("up")
        assert isinstance(layer, nn.Linear)
        layer.weight.data = layer.weight.to(torch.bfloat16).float()
        task = toy_task(("bf16", "fp32"), model=model)
        found = prices(self.plugin(name)(task))
        exact = [unit.name == "up" for unit in task.units]
        assert ((found[:, 0] == 0) == exact).all()
        assert (found[:, 1] == 0).all()

    def test_nats_are_nats(self, name: str, task: Task) -> None:
        """Prices in nats per token add up to the KL that is measured, unit by unit, at 4 bits."""
        scores = self.plugin(name)(task)
        if not scores.in_nats:
            pytest.skip(f"{name} is not in nats")
        measured = sum(measured_kl(task, u, task.formats[1]) for u in range(len(task.units)))
        assert measured / NATS < prices(scores)[:, 1].sum() < measured * NATS

    def test_counts_the_samples_it_has_done(self, name: str) -> None:
        """A progress bar ends where it should."""
        done: list[int] = []
        task = toy_task(samples=10, advance=done.append)
        self.plugin(name)(task)
        assert sum(done) == task.samples.count

    def test_leaves_the_model_as_it_was(self, name: str, task: Task) -> None:
        """Weights, hooks and what requires a gradient."""
        before = {k: v.clone() for k, v in task.model.module.state_dict().items()}
        self.plugin(name)(task)
        after = task.model.module.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        for module in task.model.module.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert not any(p.requires_grad for p in task.model.module.parameters())

"""What every sensitivity metric promises."""

from __future__ import annotations

import numpy as np
import pytest

from bitplan.sensitivity.metrics import METRICS, Scores
from bitplan.tests.toys import FORMATS, softmax_regression, task


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_prices_every_format_and_repeats_with_its_seed(name: str) -> None:
    model, batches = softmax_regression(2)
    first, second = (METRICS.get(name)(task(model, batches)) for _ in range(2))
    assert isinstance(first, Scores)
    assert first.values.shape[1:] == (1, len(FORMATS))
    assert np.isfinite(first.values).all()
    np.testing.assert_array_equal(first.values, second.values)
    price = (first.values**2 if first.signed else first.values).mean(0)[0]
    assert price[0] > price[2] > 0, "2 bits must cost more than 8"

"""Our metrics against the contract."""

from bitplan.sensitivity.metrics import METRICS
from bitplan.testing import MetricContract


class TestMetrics(MetricContract):
    plugins = METRICS.names()

"""Any module: a small CNN through `bitplan search examples/cnn.py:make --budget 5bpw`."""

import torch
from torch import nn

from bitplan import Workload


def make() -> Workload:
    """A CNN with random weights and images; put your own model and data here."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    images = torch.randn(16, 32, 3, 32, 32)
    return Workload(
        model,
        calibration=list(images[:12]),  # batches; samples are the first dimension
        evaluation=list(images[12:]),  # held out
        logits=lambda output: output,  # output -> [samples, ..., classes]
    )

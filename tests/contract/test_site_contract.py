"""Our sites against the contract, each in a toy that has what is odd about it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitplan.models.sites import SITES
from bitplan.models.workload import LoadedModel
from bitplan.testing import SiteContract, toy_of
from bitplan.testing.toys import VOCABULARY, drawn


class Doubled(nn.Linear):
    """A linear layer with code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class LinearToy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.doubled = nn.Linear(12, 40), Doubled(40, 24)
        self.transposed, self.read = Conv1D(20, 24), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.transposed(self.doubled(x)))
        return F.linear(x, self.read.weight, self.read.bias)  # its parent reads the weight


class Reflected(nn.Conv2d):
    """A subclass with another padding."""


class ConvToy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 36, 3, padding="same")
        self.groups = nn.Conv2d(36, 48, 3, groups=3, stride=2)
        self.depthwise = nn.Conv2d(48, 48, 3, groups=48, padding=1)
        self.reflected = Reflected(48, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 10, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.line(x)).unflatten(2, (6, 6))
        x = torch.tanh(self.depthwise(torch.tanh(self.groups(x))))
        x = self.up(torch.tanh(self.reflected(x)))
        return x.flatten(2).mT


class Scaled(nn.Embedding):
    """A table with code of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class EmbeddingToy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 40), Scaled(9, 40)
        self.head = nn.Linear(40, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        logits: Tensor = self.head(torch.tanh(self.tokens(ids) + self.positions(positions)))
        return logits


class ExpertsToy(nn.Module):
    """Every position goes to the experts whose input is positive: to none, some or all of four."""

    def __init__(self, width: int = 36, inner: int = 20) -> None:
        super().__init__()
        self.num_experts, self.hidden_size = 4, width
        self.up = nn.Parameter(torch.empty(4, width, inner))
        self.down = nn.Parameter(torch.empty(4, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            rows = (x[..., expert] > 0).nonzero(as_tuple=True)
            if len(rows[0]):
                hidden = torch.tanh(x[rows] @ self.up[expert])
                out = out.index_put(rows, hidden @ self.down[expert], accumulate=True)
        return out


class RecurrentToy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 12, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(24, 10, num_layers=2, batch_first=True)
        self.cell = nn.GRUCell(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gru(self.lstm(x)[0])[0]
        state = torch.zeros_like(x[:, 0])
        states = [state := self.cell(x[:, t], state) for t in range(x.shape[1])]
        return torch.stack(states, 1)


class GenericToy(nn.Module):
    """Weights of several dimensions that no module of torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.empty(2, 12, 40))  # heads, width, each head's features
        self.mixed = nn.Parameter(torch.empty(8, 5, 4, 4))
        self.table = nn.Parameter(torch.empty(80, 8))

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("btw,hwf->bthf", x, self.heads)
        hidden = torch.tanh(heads.flatten(2)) @ self.table
        return torch.einsum("bto,oihw->bti", torch.tanh(hidden), self.mixed)


def inputs(*shape: int) -> list[Tensor]:
    return [drawn((2, *shape), seed) for seed in (1, 2)]


def ids(length: int) -> list[Tensor]:
    return [(VOCABULARY * drawn((2, length), seed).abs()).long() % VOCABULARY for seed in (1, 2)]


class TestSites(SiteContract):
    plugins = SITES.names()

    def toy(self, name: str) -> LoadedModel:
        module, batches = {
            "linear": (LinearToy, inputs(5, 12)),
            "conv": (ConvToy, inputs(4, 36)),
            "embedding": (EmbeddingToy, ids(9)),
            "experts": (ExpertsToy, inputs(7, 36)),
            "recurrent": (RecurrentToy, inputs(5, 6)),
            "generic": (GenericToy, inputs(5, 12)),
        }[name]
        return toy_of(module(), batches)

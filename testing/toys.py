"""A network of a few thousand seeded weights with matrices of every common kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..models.find import find_units
from ..models.rendering import Renderer
from ..models.samples import samples_from_batches
from ..models.workload import Batch, LoadedModel, Workload
from ..quantizers.format import Format
from ..sensitivity.metrics import Task

FORMATS = ("int2-g32-asym", "int4-g32-asym", "int8-g32-asym")
VOCABULARY = 32


class ToyNetwork(nn.Module):
    """An embedding, a grouped convolution over positions, an MLP, and a head tied to the embedding.

    Token ids [samples, positions] in, logits [samples, positions, 32] out; no position sees
    later ones.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Conv2d(width, width, (1, 2), groups=2)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x = self.embed(ids)
        before = nn.functional.pad(x.mT[:, :, None], (1, 0))  # [samples, width, 1, positions + 1]
        x = x + self.mix(before)[:, :, 0].mT
        x = x + self.down(torch.tanh(self.up(x)))
        logits: Tensor = self.head(x)
        return logits


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    """Nearly standard normal numbers, float32 [shape], the same on every machine.

    They are sums of twelve uniform 16-bit integers, exact in float32; the generators of normal
    numbers differ in the last bit between processors.
    """
    integers = np.random.RandomState(seed).randint(0, 1 << 16, (12, *shape)).sum(axis=0)
    return torch.from_numpy((integers - 12 * ((1 << 16) - 1) // 2) / (1 << 16)).float()


def seeded(module: nn.Module, std: float = 0.2, seed: int = 0) -> nn.Module:
    """Fill every parameter with :func:`drawn` numbers, those of norms near 1, and freeze them."""
    for i, (name, parameter) in enumerate(module.named_parameters()):
        values = std * drawn(parameter.shape, 1000 * seed + i)
        parameter.data.copy_(1 + values if "norm" in name else values)
    return module.requires_grad_(False).eval()


def toy_of(module: nn.Module, batches: Sequence[Batch] = (), std: float = 0.2) -> LoadedModel:
    """A module with seeded weights, frozen, and batches [samples, ...] of its inputs."""
    seeded(module, std)
    return LoadedModel("toy", module, "float32", Workload(module, batches))


def toy_model(std: float = 0.2) -> LoadedModel:
    """A :class:`ToyNetwork` with seeded weights; it has no tokenizer, so labels are sampled."""
    return toy_of(ToyNetwork(), std=std)


def toy_task(
    formats: Sequence[str] = FORMATS,
    *,
    model: LoadedModel | None = None,
    samples: int = 16,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Task:
    """What a metric is asked: four units of the :class:`ToyNetwork`, and random token ids.

    Args:
        formats: Candidate formats.
        model: The model; a :func:`toy_model` by default.
        samples: Sequences of 12 tokens, in two batches.
        seed: Seed of the metric's own draws.
        advance: Called with numbers of finished samples.

    Example:
        >>> task = toy_task()
        >>> [unit.name for unit in task.units]
        ['embed', 'mix', 'up', 'down']
        >>> [unit.shapes[0] for unit in task.units]
        [(32, 32), (32, 32), (64, 32), (32, 64)]
    """
    model = model or toy_model()
    ids = torch.from_numpy(np.random.RandomState(0).randint(0, VOCABULARY, (samples, 12)))
    batches = ids.long().split((samples + 1) // 2)
    units = find_units(model.module)
    return Task(
        model,
        units,
        [Format.parse(name) for name in formats],
        Renderer(model.module, units),
        samples_from_batches(batches, model, "toy", 0),
        seed,
        advance,
    )


def measured_kl(task: Task, unit: int, fmt: Format) -> float:
    """KL(p_original || p_quantized) with one unit in a format, mean nats per token."""
    total, tokens = 0.0, 0
    assignment = dict.fromkeys(task.units[unit].modules, fmt)
    with torch.no_grad():
        for batch in task.samples.batches:
            p = task.model.logits(batch).double().log_softmax(-1)
            with task.renderer.applied(assignment):
                q = task.model.logits(batch).double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            tokens += p.shape[0] * p.shape[1]
    return total / tokens

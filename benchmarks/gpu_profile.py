"""What a profile takes on a device, against a plain forward and backward pass."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bitplan.benchmarks.gpu_llama import Config, plain_llama
from bitplan.models.find import find_units
from bitplan.models.rendering import Renderer
from bitplan.models.samples import samples_from_batches
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.sensitivity.metrics import METRICS, Task

FORMATS = ("int2-g64-asym", "int3-g64-asym", "int4-g64-asym", "int8-g64-asym")


def profile_times(
    config: Config, device: torch.device, seed: int, sequences: int, length: int, batch: int
) -> dict[str, Any]:
    """Seconds of rounding, of the default metric, and of a plain pass over the same sequences.

    Everything in float32, as prices are; the plain pass makes the gradients of all weights.  Each
    pass runs once before it is timed, on one batch.
    """
    model = plain_llama(config, device, torch.float32, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocabulary, (sequences, length), generator=generator)
    batches = tuple(some.to(device) for some in ids.split(batch))
    loaded = LoadedModel("llama of random weights", model, "float32", Workload(model))
    units = find_units(model, ["layers.*"])
    formats = [Format.parse(name) for name in FORMATS]
    samples = samples_from_batches(batches, loaded, "random", seed)
    renderer = Renderer(model, units)
    found: dict[str, Any] = {
        "units": len(units),
        "formats": list(FORMATS),
        "sequences": sequences,
        "length": length,
        "batch": batch,
    }
    plain_pass(model, batches[:1])
    found["plain_s"] = _seconds(lambda: plain_pass(model, batches), device)
    model.requires_grad_(False)
    found["rounding_s"] = _seconds(lambda: renderer.fit(formats), device)

    def metric(some: Any) -> None:
        task = Task(loaded, units, formats, renderer, some, seed, lambda _: None)
        METRICS.get("fisher")(task)

    metric(samples_from_batches(batches[:1], loaded, "random", seed))
    _reset_peak(device)
    found["metric_s"] = _seconds(lambda: metric(samples), device)
    found["metric_peak_gb"] = _peak(device)
    found["metric_over_plain"] = found["metric_s"] / found["plain_s"]
    found["profile_over_plain"] = (found["metric_s"] + found["rounding_s"]) / found["plain_s"]
    return found


def plain_pass(model: nn.Module, batches: tuple[torch.Tensor, ...]) -> None:
    """Forward and backward over all batches, with gradients of the weights of all blocks."""
    layers = model.get_submodule("layers")
    layers.requires_grad_(True)
    for ids in batches:
        logits = model(ids)[:, :-1]
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        layers.zero_grad(set_to_none=True)


def _seconds(run: Any, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0

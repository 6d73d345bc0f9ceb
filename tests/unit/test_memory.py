"""What weights take on a device, next to what they take in a file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from bitplan.kernels.latency import Device
from bitplan.kernels.packing import PlanePack
from bitplan.kernels.packing import resident_bytes as laid_out
from bitplan.models.find import find_units
from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import PackedTensor
from bitplan.search.limits import Limits
from bitplan.search.memory import resident_bytes
from bitplan.sensitivity.estimate import _layer_types
from bitplan.sensitivity.provenance import Provenance
from bitplan.tests.fakes import fake_table, transformer_units

FORMATS = ("int3-g64-asym", "int4-g128", "bf16")


def random_packed(fmt: Format, shape: tuple[int, int]) -> PackedTensor:
    parts = {}
    for name, (size, dtype) in fmt.tensors(shape).items():
        if dtype == "uint8":
            parts[name] = torch.randint(256, size, dtype=torch.uint8)
        else:
            parts[name] = torch.rand(size).to(getattr(torch, dtype))
    return PackedTensor(fmt, shape, parts)


def test_it_is_the_bytes_of_what_is_laid_out() -> None:
    table = fake_table(transformer_units(1), FORMATS)
    held = resident_bytes(table, "nvidia")
    for u, unit in enumerate(table.units):
        for f, name in enumerate(FORMATS[:2]):
            pack = PlanePack.from_packed(random_packed(Format.parse(name), unit.shapes[0]))
            assert held[u, f] == pack.nbytes
    assert (held[:, 2] == table.bytes[:, 2]).all()
    assert (held[:, :2] > table.bytes[:, :2]).any(), "192 rows are no multiple of 128"


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.tokens = nn.Embedding(96, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.tokens.weight
        self.conv = nn.Conv2d(8, 16, 3)
        self.linear = nn.Linear(64, 64)


def test_profiles_record_what_is_no_plain_product() -> None:
    model = Mixed()
    units = find_units(model)
    types = _layer_types(model, units)
    assert types == {"embed": "embedding", "tokens": "tied embedding", "conv": "convolution"}
    table = replace(fake_table(units, FORMATS), provenance=Provenance(layer_types=types))
    held = resident_bytes(table, "nvidia")
    row = {unit.name: u for u, unit in enumerate(units)}
    for name in ("embed", "conv"):  # held as they are stored
        assert (held[row[name]] == table.bytes[row[name]]).all()
    fmt = Format.parse(FORMATS[0])
    stored = int(table.bytes[row["tokens"], 0])
    assert held[row["tokens"], 0] == laid_out(fmt, (96, 64)) + stored, "rows are looked up as well"
    assert held[row["linear"], 0] == laid_out(fmt, (64, 64))

    limits = Limits(device=Device.load("h100"))
    time = limits.milliseconds(table, np.ones(table.kl.shape, dtype=bool))
    assert (time[row["embed"]] == 0).all(), "nothing is multiplied"
    others = [row[name] for name in ("tokens", "conv", "linear")]
    assert (time[others] > 0).all()


def test_what_a_runtime_fuses_is_one_product() -> None:
    from bitplan.quantizers.runtimes import Rules

    device = Device.load("h100")
    table = fake_table(transformer_units(1), ("int4-g64", "bf16")).merged(["q_proj,k_proj,v_proj"])
    allowed = np.ones(table.kl.shape, dtype=bool)
    apart = Limits(device=device).milliseconds(table, allowed)
    fused = Limits(device=device, rules=Rules.load("vllm")).milliseconds(table, allowed)
    u = next(u for u, unit in enumerate(table.units) if len(unit.modules) > 1)
    whole = device.seconds(Format.parse("int4-g64"), (576 + 192 + 192, 576), 1)
    assert round(1e6 * fused[u, 0]) == np.ceil(1e9 * whole), "whole nanoseconds, rounded up"
    assert apart[u, 0] - fused[u, 0] > 2e3 * 0.9 * device.launch.value, "two launches are saved"
    rest = np.arange(len(table.units)) != u
    assert (apart[rest] == fused[rest]).all()

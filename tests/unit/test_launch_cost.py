"""The cost of a launch: which cuts of a product it prefers, and that it is the latency model."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from bitplan.kernels.lab.launch_cost import Cut, average_instructions, launch_seconds, perf_model
from bitplan.kernels.latency import Device
from bitplan.quantizers.format import Format

CELL = 128 * 128 // 2  # bytes at 4 bits


def seconds(device: Device, rows: int, cols: int, tokens: int, cut: Cut) -> float:
    size = Format.parse("int4-gc").stored_bytes((rows, cols))
    cost = average_instructions(device.kernels[device.default], 4)
    return launch_seconds(device, rows, cols, tokens, size, cost, cut)


def best_splits(device: Device, rows: int, cols: int) -> int:
    cuts = [Cut(128, 8, splits, 2, 2 * CELL) for splits in (1, 2, 4, 8, 16)]
    return min(cuts, key=lambda cut: seconds(device, rows, cols, 1, cut)).splits


def test_a_cut_that_fills_the_device_costs_what_the_latency_model_says() -> None:
    device = Device.load("h100")
    rows, cols = 128 * 132 * 64, 4096  # whole waves of programs
    found = seconds(device, rows, cols, 1, Cut(128, 8, 1, 2, 4 * CELL))
    fmt = Format.parse("int4-gc")
    assert found == pytest.approx(device.seconds(fmt, (rows, cols), 1), rel=1e-3)


def test_few_rows_are_split_and_many_are_not() -> None:
    device = Device.load("a100")
    assert best_splits(device, 128, 65536) >= 8
    assert best_splits(device, 128 * 108 * 8, 4096) == 1


@pytest.mark.parametrize("name", ["a100", "h100", "b200", "mi300x"])
def test_a_block_of_many_tokens_is_for_many_tokens(name: str) -> None:
    device = Device.load(name)
    cuts = [Cut(128, tokens, 1, 2, 2 * CELL) for tokens in (8, 16, 32, 64)]

    def best(tokens: int) -> int:
        return min(cuts, key=lambda cut: seconds(device, 16384, 16384, tokens, cut)).tokens

    assert best(1) == 8
    assert best(64) > 8


def test_cells_in_flight_hide_the_memory() -> None:
    device = Device.load("h100")
    few, more = (
        seconds(device, 4096, 4096, 1, Cut(128, 8, 1, 2, stages * CELL)) for stages in (1, 4)
    )
    assert few > 1.2 * more


def test_what_autotuning_calls() -> None:
    device = Device.load("h100")
    rank = perf_model(device)
    words = torch.empty(4096 * 4096 * 3 // 32, dtype=torch.int32, device="meta")
    scales = torch.empty(32, 4096, dtype=torch.float16, device="meta")
    zeros = torch.empty(32, 4096, 3, dtype=torch.uint8, device="meta")

    def of(splits: int, tokens: int, stages: int) -> float:
        return rank(
            words=words,
            scales=scales,
            zeros=zeros,
            M=1,
            N=4096,
            x_stride=4096,
            splits=splits,
            ROWS=128,
            COLS=128,
            TOKENS=tokens,
            STAGES=stages,
            num_warps=2,
            BITS=(3,),
            bias=None,
        )

    cost = average_instructions(device.kernels["planepack"], 3.0)
    size = words.nbytes + scales.nbytes + zeros.nbytes
    cut = Cut(128, 8, 2, 2, 2 * 128 * 128 * 3 // 8)
    assert of(2, 8, 2) == launch_seconds(device, 4096, 4096, 1, size, cost, cut)
    times = [of(*choice) for choice in product((1, 2, 4), (8, 32), (1, 2, 4))]
    assert all(np.isfinite(times)) and len(set(times)) > 6


def test_instructions_between_two_widths() -> None:
    kernel = Device.load("h100").kernels["planepack"]
    assert kernel.instructions is not None
    three, four = kernel.instructions.value[3], kernel.instructions.value[4]
    assert average_instructions(kernel, 3) == three
    assert average_instructions(kernel, 3.5) == pytest.approx((three + four) / 2)
    assert average_instructions(Device.load("h100").kernels["dense"], 4) == 0


def test_tuning_measures_what_the_model_prefers() -> None:
    pytest.importorskip("triton")
    from bitplan.kernels.packing import PlanePack
    from bitplan.kernels.tune import candidates, prune
    from bitplan.quantizers.packed import PackedTensor

    fmt, shape = Format.parse("int4-g128-asym"), (128, 8192)
    parts = {
        name: torch.randint(256, size, dtype=torch.uint8)
        if dtype == "uint8"
        else torch.rand(size).to(torch.float16)
        for name, (size, dtype) in fmt.tensors(shape).items()
    }
    pack = PlanePack.from_packed(PackedTensor(fmt, shape, parts))
    launches = candidates(pack, 1)
    first, *_, last = prune(pack, 1, launches, perf_model(Device.load("h100")), len(launches))
    assert first.splits >= 8, "one row block leaves 131 processors without work"
    assert last.splits == 1

"""Choosing launches: the rule, the candidates, and what a latency model lets through."""

import pytest

from bitplan.kernels.lab.launch_cost import perf_model
from bitplan.kernels.latency import Device
from bitplan.kernels.packing import PlanePack
from bitplan.tests.packs import random_packed

pytest.importorskip("triton", reason="the kernels need Triton")

from bitplan.kernels import tune
from bitplan.kernels.triton_launch import Launch


@pytest.fixture(scope="module")
def pack() -> PlanePack:
    return PlanePack.from_packed(random_packed("int4-g128", (512, 2048)))


def test_the_rule_occupies_a_device_but_keeps_programs_long(pack: PlanePack) -> None:
    assert tune.rule(pack, 1, 1) == Launch(tokens=8, warps=2, stages=2, splits=1)
    assert tune.rule(pack, 1, 2).splits == 2  # 4 row blocks, 4 programs per processor
    assert tune.rule(pack, 1, 1000).splits == 16 // 4  # 16 cells, at least 4 each
    assert tune.rule(pack, 20, 1).tokens == 32
    assert tune.rule(pack, 64, 1).tokens == 32


def test_amd_multiplies_sixteen_tokens_at_least() -> None:
    pack = PlanePack.from_packed(random_packed("int4-g128", (64, 128)), "amd")
    assert tune.rule(pack, 1, 1) == Launch(tokens=16, warps=1, stages=1, splits=1)
    assert {launch.tokens for launch in tune.candidates(pack, 1)} == {16}
    assert {launch.warps for launch in tune.candidates(pack, 40)} == {1}


def test_candidates_hold_the_rule_and_differ(pack: PlanePack) -> None:
    for tokens in (1, 5, 16, 33, 64):
        found = tune.candidates(pack, tokens)
        assert len(set(found)) == len(found) > 20
        assert tune.rule(pack, tokens, 2) in found
        assert all(launch.splits <= 16 for launch in found)


def test_a_model_prunes(pack: PlanePack) -> None:
    """Seconds from the names of the kernel's arguments; the best come first."""
    found = tune.candidates(pack, 9)
    kept = tune.prune(
        pack, 9, found, lambda *, TOKENS, splits, **_: abs(TOKENS - 16) + abs(splits - 4), 3
    )
    assert len(kept) == 3
    assert all((launch.tokens, launch.splits) == (16, 4) for launch in kept)


def test_the_latency_model_is_such_a_model(pack: PlanePack) -> None:
    """One token of a small matrix on a large device: cut K, or processors stand still."""
    device = Device.of("NVIDIA H100 80GB HBM3")
    assert device is not None
    model = perf_model(device)
    best = tune.prune(pack, 1, tune.candidates(pack, 1), model, 5)
    assert len(best) == 5
    assert all(launch.tokens == 8 for launch in best)


def test_tuning_needs_a_device(pack: PlanePack) -> None:
    import torch

    with pytest.raises(ValueError, match="Tuning measures on a GPU"):
        tune.tune(torch.zeros(1, 2048), pack, lambda **_: 0.0)

"""Committed figures: packed bytes exactly, the tiny model's plans within a quarter.

The tiny model is trained on prose that changes a little between Python releases.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitplan._base.progress import Reporter
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import Grid
from bitplan.quantizers.packed import PackedTensor
from bitplan.search.plan import Plan

HERE = Path(__file__).parent


def compare(name: str, found: object, update: bool) -> object:
    """The committed content of a golden file, or ``found`` when it is being rewritten."""
    path = HERE / name
    if update:
        path.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(path.read_text())


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


def test_packed_bytes(update: bool) -> None:
    """A change here breaks every packed folder users have: it needs a new layout version."""
    weight = torch.arange(-12, 12).float().view(2, 12)
    found = {}
    for bits in range(1, 9):
        fmt = Format.parse(f"int{bits}-gc-asym")
        top = 2**bits - 1
        grid = Grid(
            torch.full((2, 1), 24 / top).half(), torch.tensor([[top], [0]], dtype=torch.uint8)
        )
        packed = PackedTensor.pack(weight, fmt, grid)
        found[fmt.name] = {
            k: bytes(v.view(torch.uint8).flatten().tolist()).hex()
            for k, v in packed.tensors.items()
        }
    assert found == compare("packed.json", found, update)


@pytest.fixture(scope="module")
def plans(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    run = tmp_path_factory.mktemp("golden")
    settings = ProfileSettings(model=str(tiny_folder), sequences=64, length=64, device="cpu")
    return {
        budget: run_search(
            settings, SearchSettings(budget=budget, eval_tokens=4096), run, Reporter(quiet=True)
        )
        for budget in ("2.6bpw", "3.5bpw", "4.3bpw")
    }


def test_tiny_plans(plans: dict[str, Plan], update: bool) -> None:
    found = {}
    for budget, plan in plans.items():
        assert plan.measured is not None
        found[budget] = {
            "bytes": plan.bytes,
            "predicted_kl": round(plan.predicted_kl, 5),
            "measured_kl": round(plan.measured.kl, 5),
            "solver": plan.solver,
            "formats": sorted(set(plan.assignments.values())),
        }
    golden = compare("tiny_plans.json", found, update)
    assert isinstance(golden, dict)
    for budget, figures in found.items():
        before = golden[budget]
        assert figures["solver"] == before["solver"]
        assert figures["bytes"] == pytest.approx(before["bytes"], rel=0.02)
        for kl in ("predicted_kl", "measured_kl"):
            assert figures[kl] == pytest.approx(before[kl], rel=0.25)


def test_plans_improve_with_the_budget_and_beat_uniform(plans: dict[str, Plan]) -> None:
    measured = [plan.measured.kl for plan in plans.values() if plan.measured]
    assert measured == sorted(measured, reverse=True)
    for plan in plans.values():
        assert plan.measured is not None
        assert 0.6 < plan.predicted_kl / plan.measured.kl < 1.6
        rivals = [b.kl for b in plan.baselines if b.bytes <= plan.budget.bytes]
        assert plan.measured.kl <= min(rivals)

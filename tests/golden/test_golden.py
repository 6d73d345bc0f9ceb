"""Committed figures: packed bytes and plans exactly, KLs to a thousandth.

Weights and text are drawn as integers, the same everywhere. The KLs of one and of two threads are
the same to the last digit; a thousandth leaves room for other processors' sums.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitplan._base.progress import Reporter
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import Grid
from bitplan.quantizers.packed import PackedTensor
from bitplan.search.plan import Plan
from bitplan.testing.llama import save_toy_llama

HERE = Path(__file__).parent
WORDS = ["the", "a", "model", "weight", "code", "scale", "of", "every", "stores", "row", "by", "to"]
KL_TOLERANCE = 1e-3


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


def words(count: int, seed: int) -> str:
    """Text of a few words, some of them more often than others."""
    drawn = np.random.RandomState(seed).randint(0, len(WORDS), (count, 2)).min(axis=1)
    return " ".join(WORDS[i] for i in drawn)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    folder = tmp_path_factory.mktemp("golden")
    texts = [folder / name for name in ("calibration.txt", "evaluation.txt")]
    for seed, text in enumerate(texts):
        text.write_text(words(2500, seed))
    model = save_toy_llama(folder / "model", hidden=64, tied=True)
    settings = ProfileSettings(
        str(model),
        rounding="rtn",
        calibration=str(texts[0]),
        sequences=64,
        length=64,
        device="cpu",
    )
    return {
        budget: run_search(
            settings,
            SearchSettings(budget, evaluation=str(texts[1]), eval_tokens=4096),
            folder / "run",
            Reporter(quiet=True),
        )
        for budget in ("2.6bpw", "3.5bpw", "4.3bpw")
    }


def test_plans(plans: dict[str, Plan], update: bool) -> None:
    found: dict[str, dict[str, Any]] = {}
    for budget, plan in plans.items():
        assert plan.measured is not None
        kl = {"predicted": plan.predicted_kl, "measured": plan.measured.kl}
        kl |= {rival.name: rival.kl for rival in plan.baselines}
        found[budget] = {
            "solver": plan.solver,
            "bytes": plan.bytes,
            "assignments": plan.assignments,
            "kl": {name: float(f"{value:.6g}") for name, value in kl.items()},
        }
    golden = compare("plans.json", found, update)
    assert isinstance(golden, dict)
    assert found.keys() == golden.keys()
    for budget, figures in found.items():
        before = golden[budget]
        for exact in ("solver", "bytes", "assignments"):
            assert figures[exact] == before[exact]
        assert figures["kl"] == pytest.approx(before["kl"], rel=KL_TOLERANCE)


def test_plans_improve_with_the_budget_and_beat_uniform(plans: dict[str, Plan]) -> None:
    measured = [plan.measured.kl for plan in plans.values() if plan.measured]
    assert len(measured) == len(plans)
    assert measured == sorted(measured, reverse=True)
    for plan in plans.values():
        assert plan.measured is not None
        assert 0.8 < plan.predicted_kl / plan.measured.kl < 1.4
        rivals = [b.kl for b in plan.baselines if b.bytes <= plan.budget.bytes]
        assert len(rivals) > 1
        assert plan.measured.kl <= min(rivals)

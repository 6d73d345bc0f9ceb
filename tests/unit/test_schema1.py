"""Plans and frontiers that the first schema wrote are read, and what their words said is data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitplan.search.frontier import Frontier
from bitplan.search.plan import Plan

FILES = Path(__file__).resolve().parents[1] / "data" / "schema1"
SAME = ("assignments", "bytes", "weights", "bpw", "predicted_kl", "gap", "measured", "kv_cache")


def written(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((FILES / name).read_text())
    return found


@pytest.mark.parametrize("name", ["budget", "memory", "quality", "speed"])
def test_figures_stay_and_a_saved_plan_is_of_the_new_schema(name: str, tmp_path: Path) -> None:
    before = written(f"plan-{name}.json")
    plan = Plan.load(FILES / f"plan-{name}.json")
    assert before["schema"] == 1
    assert plan.schema_version == 2
    assert plan.goal == name
    after = plan.model_dump()
    for key in SAME:
        assert after[key] == before[key]
    assert (plan.coverage, plan.model_bytes, plan.original_bytes) == (None, None, None)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["schema"] == 2


def test_what_was_asked_for_is_data() -> None:
    budgets = {n: Plan.load(FILES / f"plan-{n}.json").budget for n in ("budget", "memory", "speed")}
    assert {name: b.kind for name, b in budgets.items()} == {
        "budget": "bytes",
        "memory": "memory",
        "speed": "target",
    }
    assert budgets["memory"].memory == 90_000
    assert budgets["budget"].memory is None


def test_baselines_with_one_format_say_which() -> None:
    plan = Plan.load(FILES / "plan-memory.json")
    assert [b.format for b in plan.baselines] == [
        "int2-g32-asym + kv2",
        "int2-g64-asym + kv4",
        "int2-g64-asym + kv2",
    ]
    mixed, *others = Plan.load(FILES / "plan-speed.json").baselines
    assert (mixed.name, mixed.format) == ("certified plan", None)
    assert all(b.name == f"uniform {b.format}" for b in others)


def test_a_damaged_plan_of_the_first_schema_says_where(tmp_path: Path) -> None:
    data = written("plan-budget.json")
    del data["budget"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"plan\.json is not a valid plan: .*budget"):
        Plan.load(path)
    path.write_text(json.dumps(data | {"schema": 3}))
    with pytest.raises(ValueError, match=r"is not a valid plan: schema: Input should be 2"):
        Plan.load(path)


def test_frontiers_are_read() -> None:
    frontier = Frontier.load(FILES / "frontier.json")
    plan = Plan.load(FILES / "plan-budget.json")
    assert frontier.model == plan.model
    assert frontier.weights == plan.weights
    assert frontier.lower_bound(plan.bytes) <= plan.predicted_kl

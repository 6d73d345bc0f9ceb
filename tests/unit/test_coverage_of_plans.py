"""How much of a model a plan is about: recorded, shown, and refused where it would mislead."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitplan._base.progress import Reporter
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.search import run_profile
from bitplan.jobs.settings import ProfileSettings
from bitplan.reports.prose import headline, tiles
from bitplan.reports.summary import comparison, facts
from bitplan.search.goals import Asked, ModelFacts
from bitplan.search.goals.budget import OfBudget
from bitplan.search.plan import Plan
from bitplan.search.solve import solve
from bitplan.sensitivity.table import SensitivityTable

from ..fakes import fake_table, transformer_units

OUTSIDE = 1_000_000


def covering(share: float, **more: Any) -> SensitivityTable:
    """A table whose units hold this share of the model's weights; experts are the rest."""
    table = fake_table(transformer_units(1))
    everything = round(table.weights / share)
    left = everything - table.weights
    coverage = {
        "planned": table.weights,
        "weights": everything,
        "left_out": [{"name": "experts", "weights": left, "reason": "no site"}] if left else [],
        **more,
    }
    known = {"coverage": coverage, "outside_bytes": OUTSIDE, "dtype": "bfloat16"}
    return replace(table, provenance=table.provenance.model_copy(update=known))


@pytest.mark.parametrize("budget", ["3bpw", "0.25x"])
def test_a_budget_per_weight_of_a_part_of_the_model_is_refused(budget: str) -> None:
    table = covering(0.15)
    with pytest.raises(ValueError, match=rf"{budget} would hold for 15% of .*experts"):
        solve(table, budget)
    asked = OfBudget(Asked(budget=budget), ModelFacts("m", True))
    with pytest.raises(ValueError, match=r"--include or --exclude"):
        asked.resolve(asked.problem(table), table)


def test_other_budgets_warn_and_chosen_units_are_what_was_asked_for() -> None:
    with pytest.warns(UserWarning, match=r"15\.0 % of .* weights are planned; not experts"):
        solve(covering(0.15), "1MB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = solve(covering(0.15, selected=True), "3bpw")
        solve(covering(0.9), "3bpw")
    assert plan.coverage is not None
    assert plan.coverage.share == pytest.approx(0.15, rel=1e-6)


def test_a_plan_says_what_the_whole_file_takes(tmp_path: Path) -> None:
    table = covering(0.9)
    plan = solve(table, "4.3bpw")
    assert plan.model_bytes == plan.bytes + OUTSIDE
    assert plan.original_bytes == 2 * table.weights + OUTSIDE
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    before, after = f"{plan.original_bytes / 1e6:.1f} MB", f"{plan.model_bytes / 1e6:.1f} MB"
    said = dict(facts(plan, comparison(plan)))
    share = f"({100 * plan.model_bytes / plan.original_bytes:.1f} %)"
    assert said["size"] == f"{before} → {after} {share}, the whole model's file"
    assert said["coverage"].startswith("90.0 % of ") and "experts" in said["coverage"]
    assert headline(plan).startswith(f"{before} → {after}, ")
    assert tiles(plan, [])[0][1] == "of the original file"


def test_a_quantized_file_is_compared_with_what_it_took() -> None:
    table = covering(1.0)
    origin = table.provenance.model_copy(update={"dtype": "float32", "file_bytes": 2_500_000})
    plan = solve(replace(table, provenance=origin), "4.3bpw")
    assert plan.original_bytes == 2_500_000


def test_nearly_all_is_not_all() -> None:
    almost = solve(covering(0.999_99), "4.3bpw")
    assert dict(facts(almost, []))["coverage"].startswith("99.9 % of ")
    whole = solve(covering(1.0), "4.3bpw")
    assert dict(facts(whole, []))["coverage"] == f"all {whole.weights:,} weights are planned"


def test_experts_that_no_token_reached_are_counted() -> None:
    plan = solve(covering(1.0, unreached=["experts.3", "experts.7"]), "4.3bpw")
    assert "reached 2 experts" in dict(facts(plan, []))["coverage"]


def test_without_a_record_nothing_is_claimed() -> None:
    plan = solve(fake_table(transformer_units(1)), "4.3bpw")
    assert (plan.coverage, plan.model_bytes) == (None, None)
    said = dict(facts(plan, []))
    assert "coverage" not in said and "at 16 bits" in said["size"]


def test_bits_of_a_part_of_the_model_are_called_that() -> None:
    part = solve(covering(0.15), "1MB")
    assert f"{part.bpw:.2f} bits per planned weight, " in headline(part)
    assert "bits per planned weight" in dict(facts(part, []))
    assert tiles(part, [])[1][1].startswith("bits per planned weight, ")
    whole = solve(covering(0.95), "4.3bpw")
    assert f"{whole.bpw:.2f} bits per weight, " in headline(whole)


def test_a_goal_that_is_resolved_twice_warns_once() -> None:
    """As in a run: before the profile, and after it."""
    table = covering(0.2)
    goal = OfBudget(Asked(budget="1MB"), ModelFacts("m", True))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        goal.resolve(goal.problem(table), table)
        goal.resolve(goal.problem(table), table)
    assert len([w for w in found if "are planned" in str(w.message)]) == 1


def test_a_profile_that_does_not_say_takes_coverage_from_the_model(tmp_path: Path) -> None:
    """One of schema 1, in a run that goes on with this version."""
    model = tmp_path / "net.py"
    model.write_text(
        "import bitplan, torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 8))\n"
        "    return bitplan.Workload(net, calibration=[torch.randn(8, 32) for _ in range(4)])\n"
    )
    settings = ProfileSettings(f"{model}:make", formats=("int2-g32", "int4-g32"), include=("0",))
    run, quiet = tmp_path / "run", Reporter(quiet=True)
    table = run_profile(settings, run, quiet)
    known = table.provenance.coverage
    assert known is not None and known["planned"] < known["weights"]
    silent = table.provenance.model_copy(update={"coverage": None, "file_bytes": None})
    replace(table, provenance=silent).save(RunFolder(run).profile)
    again = run_profile(settings, run, quiet)
    assert again.provenance.coverage == known
    assert (again.kl == table.kl).all()

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from bitplan.models.samples import samples_from_batches
from bitplan.models.units import UnitInfo
from bitplan.quantizers.format import Format
from bitplan.search.budget import Budget
from bitplan.search.plan import Plan
from bitplan.search.solve import solve
from bitplan.search.written import plan_from_choice, predicted_kl_stderr
from bitplan.sensitivity.estimate import profile
from bitplan.sensitivity.provenance import ModelRef, Provenance
from bitplan.sensitivity.table import SensitivityTable, stored_bytes
from bitplan.tests.toys import softmax_regression

PROVENANCE = Provenance(
    model=ModelRef(id="tiny", sha256="00"),
    metric="fisher",
    rounding="rtn",
    calibration={"source": "prose", "sequences": 4},
    versions={"bitplan": "0.0.1", "torch": "2.0"},
    seed=0,
)


@pytest.fixture
def table() -> SensitivityTable:
    """A fused unit and a single one; 100 weights; scores of 4 sequences."""
    scores = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    return SensitivityTable(
        units=(
            UnitInfo("{a,b}", ("a", "b"), ((5, 8), (2, 10)), "{a,b}"),
            UnitInfo("c", ("c",), ((4, 10),), "c"),
        ),
        formats=("low", "high"),
        bytes=np.array([[20, 40], [10, 30]], dtype=np.int64),
        kl=np.array([[0.5, 0.1], [0.4, 0.3]]),
        stderr=np.array([[0.03, 0.01], [0.04, 0.02]]),
        scores=scores,
        provenance=PROVENANCE,
    )


def test_a_plan_states_budget_prices_bound_and_origin(table: SensitivityTable) -> None:
    plan = solve(table, "4.3bpw", command="bitplan solve")
    assert plan.assignments == {"a": "high", "b": "high", "c": "low"}
    assert (plan.budget.text, plan.budget.bytes) == ("4.3bpw", 53)
    assert (plan.bytes, plan.weights, plan.bpw) == (50, 100, 4.0)
    assert plan.predicted_kl == pytest.approx(0.5)
    assert (plan.lower_bound_kl, plan.gap) == (plan.predicted_kl, 0.0)
    assert (plan.metric, plan.solver, plan.rounding) == ("fisher", "certified", "rtn")
    assert plan.calibration == PROVENANCE.calibration
    assert plan.versions["torch"] == "2.0"
    assert plan.versions["bitplan"] != "0.0.1"  # of the search, not of the profile
    assert plan.command == "bitplan solve"
    assert plan.created.endswith("Z")
    assert datetime.fromisoformat(plan.created).utcoffset() is not None


@pytest.mark.parametrize("budget", [50, "50B", Budget.parse("0.25x")])
def test_budgets_of_every_type(table: SensitivityTable, budget: Budget | str | int) -> None:
    assert solve(table, budget).bytes == 50


def test_solve_reads_a_saved_profile(table: SensitivityTable, tmp_path: Path) -> None:
    formats = ("int4-gc", "int8-gc")
    size = stored_bytes(table.units, [Format.parse(name) for name in formats])
    real = replace(table, formats=formats, bytes=size)
    real.save(tmp_path / "profile.safetensors")
    from_file = solve(tmp_path / "profile.safetensors", 100)
    from_text = solve(str(tmp_path / "profile.safetensors"), 100)
    assert from_file.assignments == from_text.assignments == solve(real, 100).assignments


def test_pins_formats_and_solver_reach_the_search(table: SensitivityTable) -> None:
    assert solve(table, 60, pins={"c": "high"}).assignments["c"] == "high"
    assert set(solve(table, 30, formats=["low"]).assignments.values()) == {"low"}
    assert solve(table, 60, solver="uniform").solver == "uniform"
    assert solve(table, 60, solver="ilp").predicted_kl == solve(table, 60).predicted_kl
    with pytest.raises(ValueError, match="Did you mean 'certified'"):
        solve(table, 60, solver="certfied")


@pytest.mark.filterwarnings("error")
def test_a_budget_above_the_largest_useful_plan_is_used_and_said(table: SensitivityTable) -> None:
    with pytest.warns(UserWarning, match=r"71 B is above the largest useful plan \(70 B, 5\.600"):
        plan = solve(table, 71)
    assert (plan.bytes, plan.budget.bytes) == (70, 71)
    assert solve(table, 70).bytes == 70  # exactly the largest: no warning


def test_keep_reaches_the_search(table: SensitivityTable) -> None:
    provenance = PROVENANCE.model_copy(update={"dtype": "bfloat16"})
    known = replace(table, formats=("low", "bf16"), provenance=provenance)
    plan = solve(known, 60, pins={"c": "keep"})
    assert plan.assignments == {"a": "low", "b": "low", "c": "bf16"}


def test_a_profile_records_what_keep_means() -> None:
    model, batches = softmax_regression()
    samples = samples_from_batches(batches, model, "toy", 0)
    table = profile(model, samples, ["int4-g32", "keep"])
    assert solve(table, "32bpw", pins={"*": "keep"}).assignments == {"0": "fp32"}


def test_a_budget_below_the_smallest_plan_is_refused(table: SensitivityTable) -> None:
    with pytest.raises(ValueError, match=r"29 B is 1 B below .*30 B, 2\.400 bits per weight"):
        solve(table, 29)


def test_file_budgets_subtract_what_is_outside_the_units(table: SensitivityTable) -> None:
    known = replace(table, provenance=PROVENANCE.model_copy(update={"outside_bytes": 950}))
    assert solve(known, "file:1kB").budget.bytes == 50
    with pytest.raises(ValueError, match="does not record the bytes outside its units"):
        solve(table, "file:1kB")


def test_stderr_is_the_spread_of_whole_plans_over_sequences(table: SensitivityTable) -> None:
    assert table.scores is not None
    choice = np.array([1, 0])
    totals = [float(s[0, 1]) ** 2 + float(s[1, 0]) ** 2 for s in table.scores]
    expected = np.std(totals, ddof=1) / math.sqrt(len(totals))
    assert predicted_kl_stderr(table, choice) == pytest.approx(expected)


def test_stderr_without_scores_adds_the_units_in_squares(table: SensitivityTable) -> None:
    for scores in (None, np.ones((1, 2, 2), dtype=np.float32)):
        plain = replace(table, scores=scores)
        assert predicted_kl_stderr(plain, np.array([0, 1])) == pytest.approx(math.hypot(0.03, 0.02))


def test_any_choice_becomes_a_plan_with_the_linear_bound(table: SensitivityTable) -> None:
    plan = plan_from_choice(table, np.array([0, 1]), "uniform")
    assert (plan.bytes, plan.budget.text, plan.budget.bytes) == (50, "50B", 50)
    assert plan.lower_bound_kl == pytest.approx(0.5)  # the optimum at 50 B is on the frontier
    assert plan.gap == pytest.approx(0.3 / 0.8)


def test_a_choice_without_a_price_names_the_unit(table: SensitivityTable) -> None:
    closed = replace(table, kl=np.array([[0.5, 0.1], [0.4, np.nan]]))
    with pytest.raises(ValueError, match="Unit 'c' has no measured price in 'high'"):
        plan_from_choice(closed, np.array([0, 1]), "uniform")


def test_a_table_of_unknown_origin_is_refused(table: SensitivityTable) -> None:
    with pytest.raises(ValueError, match="does not record its model, metric"):
        solve(replace(table, provenance=Provenance()), 50)


def test_plan_file_round_trip(table: SensitivityTable, tmp_path: Path) -> None:
    table = replace(table, formats=("int2-gc", "int8-gc"))
    plan = solve(table, 50)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    assert list(data)[:3] == ["schema", "model", "assignments"]
    assert data["schema"] == 2


def test_bad_plan_files(table: SensitivityTable, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match="No plan at"):
        Plan.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a valid plan"):
        Plan.load(path)
    path.write_text(json.dumps(solve(table, 50).model_dump(by_alias=True) | {"bits": 4}))
    with pytest.raises(ValueError, match="bits: Extra inputs are not permitted"):
        Plan.load(path)


def test_a_binary_file_is_no_plan(table: SensitivityTable, tmp_path: Path) -> None:
    table.save(tmp_path / "profile.safetensors")
    says = r"profile\.safetensors is not a plan \(not a JSON text file\)"
    with pytest.raises(ValueError, match=says):
        Plan.load(tmp_path / "profile.safetensors")


def test_plan_files_are_utf8_everywhere(table: SensitivityTable, tmp_path: Path) -> None:
    table = replace(table, formats=("int2-gc", "int8-gc"))
    plan = solve(table, 50, command="größer")
    plan.save(tmp_path / "a.json")
    code = (
        "import pathlib, sys; from bitplan.search.plan import Plan\n"
        "Plan.load(pathlib.Path(sys.argv[1], 'a.json')).save(pathlib.Path(sys.argv[1], 'b.json'))"
    )
    ascii_locale = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=ascii_locale, check=True)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    assert "größer".encode() in (tmp_path / "b.json").read_bytes()


def test_search_numerics_load_no_torch() -> None:
    code = (
        "import sys, bitplan.search.solve, bitplan.search.frontier\n"
        "from bitplan.search.solvers import SOLVERS\n"
        "for name in SOLVERS.names(): SOLVERS.get(name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_format_that_does_not_exist_is_named_with_its_module(
    table: SensitivityTable, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    solve(replace(table, formats=("int2-gc", "int8-gc")), 50).save(path)
    assert Plan.load(path).assignments["c"] == "int2-gc"
    text = path.read_text()
    path.write_text(text.replace('"c": "int2-gc"', '"c": "int9-g64"'))
    with pytest.raises(ValueError, match=r"'c' has the format 'int9-g64'.*Did you mean"):
        Plan.load(path)


def test_rows_of_a_matrix_may_have_formats_of_their_own(tmp_path: Path) -> None:
    halves = UnitInfo("w[rows:0]", ("w[rows:0]",), ((2, 16),), "w", rows=(((0, 1), (3, 4)),))
    others = UnitInfo("w[rows:1]", ("w[rows:1]",), ((2, 16),), "w", rows=(((1, 3),),))
    formats = ("int2-gc", "int8-gc")
    table = SensitivityTable(
        units=(halves, others),
        formats=formats,
        bytes=stored_bytes((halves, others), [Format.parse(name) for name in formats]),
        kl=np.array([[0.5, 0.1], [0.4, 0.0]]),
        stderr=np.zeros((2, 2)),
        provenance=PROVENANCE,
    )
    plan = plan_from_choice(table, np.array([0, 1]), "certified")
    assert plan.assignments == {"w[rows:0]": "int2-gc", "w[rows:1]": "int8-gc"}
    assert {name: (r.module, r.rows) for name, r in plan.row_sets.items()} == {
        "w[rows:0]": ("w", [(0, 1), (3, 4)]),
        "w[rows:1]": ("w", [(1, 3)]),
    }
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    data = json.loads(path.read_text())
    for damage, says in (
        ({"w[rows:1]": {"module": "w", "rows": [[1, 4]]}}, "parts of w share rows 3 to 3"),
        (
            {"w[rows:1]": {"module": "w", "rows": [[2, 2]]}},
            r"rows:1\]: rows are ranges",
        ),
        ({"w[rows:2]": {"module": "w", "rows": [[1, 3]]}}, r"rows:2\]: it has no format"),
    ):
        path.write_text(json.dumps(data | {"row_sets": data["row_sets"] | damage}))
        with pytest.raises(ValueError, match=says):
            Plan.load(path)

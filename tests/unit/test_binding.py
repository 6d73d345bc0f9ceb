"""What the report says about limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitplan.jobs.settings import SearchSettings
from bitplan.reports.binding import economy, limit_rows
from bitplan.reports.data import size_unit
from bitplan.reports.run import RunData
from bitplan.search.solve import solve
from bitplan.tests.fakes import fake_run, fake_table, transformer_units


def rows_of(folder: Path, **search: object) -> dict[str, tuple[bool, str]]:
    settings = SearchSettings(budget="4.3bpw", **search) if search else None  # type: ignore[arg-type]
    run = RunData.load(fake_run(folder, search=settings))
    size = size_unit(run.plan.total_bytes / 1e6)
    return {row.name: (row.binds, row.effect) for row in limit_rows(run, economy(run), size)}


def test_the_budget_binds_and_says_what_more_would_buy(tmp_path: Path) -> None:
    run = RunData.load(fake_run(tmp_path))
    (row,) = limit_rows(run, economy(run), ("MB", 1.0))
    assert row.binds
    assert row.share == pytest.approx(run.plan.bytes / run.plan.budget.bytes)
    said = float(row.effect.rsplit(" ", 1)[1])
    size = run.plan.budget.bytes
    slope = run.frontier.lower_bound(size) - run.frontier.lower_bound(size + 1000)
    assert said == pytest.approx(1000 * slope, rel=0.02)


def test_a_budget_above_every_plan_does_not_bind(tmp_path: Path) -> None:
    run = RunData.load(fake_run(tmp_path, budget="30bpw"))
    (row,) = limit_rows(run, economy(run), ("MB", 1.0))
    assert not row.binds
    assert "no format would make" in row.effect


def test_limits_on_formats_bind_where_they_cost_something(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    rows = rows_of(
        tmp_path,
        pins={name: "int2-g128-asym"},
        bans={"*q_proj": ("int8*",)},
        at_least={"*v_proj": "int2"},
    )
    assert rows[f"--pin '{name}=int2-g128-asym'"][0]
    assert "binds for 1; without it" in rows[f"--pin '{name}=int2-g128-asym'"][1]
    assert not rows["--ban '*q_proj=int8*'"][0]
    assert not rows["--min '*v_proj=int2'"][0]


def test_loosening_a_pin_gains_at_most_what_is_said(tmp_path: Path) -> None:
    """The Lagrangian bound: the free plan's KL is not below the pinned one's less the effect."""
    name = "model.layers.0.mlp.down_proj"
    rows = rows_of(tmp_path, pins={name: "int2-g128-asym"})
    said = float(rows[f"--pin '{name}=int2-g128-asym'"][1].split("up to ")[1].split()[0])
    table = fake_table(transformer_units(3))
    pinned = solve(table, "4.3bpw", pins={name: "int2-g128-asym"}).predicted_kl
    free = solve(table, "4.3bpw").predicted_kl
    assert 0 < pinned - free <= said * 1.01
    assert pinned - free >= said / 10


def test_bit_operations_are_counted(tmp_path: Path) -> None:
    run = RunData.load(fake_run(tmp_path / "free"))
    bops = sum(16 * unit.weights * int(run.format_of(unit)[3]) for unit in run.table.units)
    loose = rows_of(tmp_path / "loose", max_bops=4.0 * bops)["BOPs"]
    tight = rows_of(tmp_path / "tight", max_bops=0.97 * bops)["BOPs"]
    assert not loose[0]
    assert tight[0]
    assert "1 % more would lower" in tight[1]


def test_a_latency_table_that_is_gone_is_no_reason_not_to_report(tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"*": {"*": 0.1}}))
    settings = SearchSettings(budget="4.3bpw", latency=str(times), max_ms=1000.0)
    run = RunData.load(fake_run(tmp_path / "run", search=settings))
    assert economy(run).note == ""
    times.unlink()
    found = economy(run)
    assert "No latency table at" in found.note
    assert found.problem.constraints == ()


def test_settings_of_a_later_job_are_not_those_of_the_plan(tmp_path: Path) -> None:
    settings = SearchSettings(budget="4.3bpw", pins={"*q_proj": "int4-g64-asym"})
    fake_run(tmp_path, search=settings)
    assert RunData.load(tmp_path).settings == settings
    record = json.loads((tmp_path / "job.json").read_text())
    record["started"] = "2999-01-01T00:00:00Z"
    (tmp_path / "job.json").write_text(json.dumps(record))
    assert RunData.load(tmp_path).settings is None


def test_a_bootstrap_of_another_plan_is_left_out(tmp_path: Path) -> None:
    fake_run(tmp_path, confidence=True)
    kept = RunData.load(tmp_path).confidence
    assert kept is not None
    assert np.isin(kept.runner_up, RunData.load(tmp_path).formats).all()
    data = json.loads((tmp_path / "confidence.json").read_text())
    next(iter(data["units"].values()))["format"] = "bf16"
    (tmp_path / "confidence.json").write_text(json.dumps(data))
    assert RunData.load(tmp_path).confidence is None

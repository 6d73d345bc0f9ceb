"""What the report carries for its scripts, unpacked again."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan.jobs.settings import SearchSettings
from bitplan.models.units import UnitInfo
from bitplan.quantizers.format import Format
from bitplan.reports.binding import economy
from bitplan.reports.data import frontier_data
from bitplan.reports.embed import MOST_STOPS, page_data
from bitplan.reports.run import RunData, unit_bytes
from bitplan.tests.fakes import fake_run, transformer_units


def unpack(text: str, dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype=np.dtype(dtype).newbyteorder("<"))


def data_of(run: RunData) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(page_data(run, frontier_data(run), economy(run))))
    return data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    units = transformer_units(3, embedding=True)
    return RunData.load(fake_run(tmp_path_factory.mktemp("run"), units, confidence=True))


@pytest.fixture(scope="module")
def data(run: RunData) -> dict[str, Any]:
    return data_of(run)


def prices(data: dict[str, Any], units: int) -> np.ndarray[Any, Any]:
    code = unpack(data["prices"]["kl"], "u2").reshape(units, -1).astype(np.float64)
    value = data["prices"]["low"] * np.exp((code - 2) * data["prices"]["step"])
    return np.where(code == 0, np.nan, np.where(code == 1, 0.0, value))


def test_prices_and_errors_survive(run: RunData, data: dict[str, Any]) -> None:
    found = prices(data, len(run.table.units))
    np.testing.assert_allclose(found, run.table.kl, rtol=3e-4)
    code = unpack(data["prices"]["error"], "u1").reshape(found.shape).astype(np.float64)
    ratio = data["prices"]["errorLow"] * np.exp((code - 1) * data["prices"]["errorStep"])
    np.testing.assert_allclose(found * ratio, run.table.stderr, rtol=0.03)


def test_a_format_without_price_and_one_that_costs_nothing(tmp_path: Path) -> None:
    formats = ("int4-g64-asym", "bf16")
    run = RunData.load(fake_run(tmp_path, formats=formats, budget="6bpw"))
    run.table.kl[2, 0] = np.nan
    found = prices(page_data(run, frontier_data(run), economy(run)), len(run.table.units))
    assert np.isnan(found[2, 0])
    assert (found[:, 1] == 0).all()


def test_names_shapes_and_places_survive(run: RunData, data: dict[str, Any]) -> None:
    names: list[str] = []
    for shared, rest in data["units"]["names"]:
        names.append((names[-1][:shared] if shared else "") + rest)
    assert names == [unit.name for unit in run.table.units]
    shape = unpack(data["units"]["shape"], "u2")
    assert [data["shapes"][s]["weights"] for s in shape] == [u.weights for u in run.table.units]
    stored = np.array([data["shapes"][s]["bytes"] for s in shape])
    np.testing.assert_array_equal(stored, run.table.bytes)
    layer, kind = unpack(data["units"]["layer"], "i2"), unpack(data["units"]["kind"], "i2")
    for unit, at, row in zip(run.table.units, layer, kind, strict=True):
        assert (None if at < 0 else data["layers"][at]) == unit.layer
        assert row == -1 if unit.layer is None else data["kinds"][row] == unit.kind


def test_the_steps_lead_to_the_plans_of_the_frontier(run: RunData, data: dict[str, Any]) -> None:
    frontier = data["frontier"]
    unit = unpack(frontier["unit"], "u4" if frontier["wide"] else "u2")
    fmt = unpack(frontier["format"], "u1")
    stops = unpack(frontier["stops"], "u4")
    for i in (0, len(stops) // 3, len(stops) - 1):
        choice = unpack(frontier["start"], "u1").copy()
        for step in range(stops[i]):
            choice[unit[step]] = fmt[step]
        rows = np.arange(len(choice))
        assert run.table.bytes[rows, choice].sum() == frontier["bytes"][i]
        assert run.table.kl[rows, choice].sum() == pytest.approx(frontier["kl"][i], rel=1e-4)
    np.testing.assert_array_equal(unpack(data["plan"], "u1"), run.choice)


def test_confidence_survives(run: RunData, data: dict[str, Any]) -> None:
    assert run.confidence is not None
    found = data["confidence"]
    agreement = unpack(found["agreement"], "u1") / found["shares"]
    np.testing.assert_allclose(agreement, run.confidence.agreement, atol=0.0021)
    runner = [run.formats[f] for f in unpack(found["runner"], "u1")]
    assert runner == list(run.confidence.runner_up)
    more = unpack(found["more"], "u2").astype(np.float64)
    more[more == found["tie"]] = np.inf
    np.testing.assert_array_equal(more, run.confidence.more_sequences)


def test_sizes_are_those_of_the_runtime(tmp_path: Path) -> None:
    search = SearchSettings(budget="4.2bpw", runtime="mlx")
    run = RunData.load(fake_run(tmp_path, formats=("int3-g32", "int4-g64"), search=search))
    data = data_of(run)
    units = unpack(data["units"]["shape"], "u2")
    sizes = np.array([entry["bytes"] for entry in data["shapes"]])[units]
    np.testing.assert_array_equal(sizes, run.table.bytes)
    assert sizes[np.arange(len(units)), run.choice].sum() == run.plan.bytes
    assert sum(unit_bytes(run, unit) for unit in run.table.units) == run.plan.bytes
    assert run.plan.bytes > sum(
        Format.parse(run.format_of(u)).stored_bytes(u.shapes[0]) for u in run.table.units
    )


def test_refused_options_are_marked(tmp_path: Path) -> None:
    search = SearchSettings(budget="4.3bpw", bans={"*q_proj": ("int2*", "int3*")})
    run = RunData.load(fake_run(tmp_path, search=search))
    bits = np.unpackbits(unpack(data_of(run)["allowed"], "u1"), bitorder="little")
    allowed = bits[: run.table.kl.size].reshape(run.table.kl.shape).astype(bool)
    np.testing.assert_array_equal(allowed, economy(run).problem.allowed)
    assert not allowed.all()


def test_a_plan_under_two_limits_carries_both_charges(tmp_path: Path) -> None:
    free = RunData.load(fake_run(tmp_path / "free"))
    bops = sum(16 * unit.weights * int(free.format_of(unit)[3]) for unit in free.table.units)
    search = SearchSettings(budget="4.3bpw", max_bops=0.97 * bops)
    run = RunData.load(fake_run(tmp_path / "both", search=search))
    found = economy(run)
    data = data_of(run)
    total = data["lambda"] * run.table.bytes
    total = total + unpack(data["charges"], "f4").reshape(run.table.kl.shape)
    np.testing.assert_allclose(total, found.charges(), rtol=1e-5)
    assert data_of(free)["charges"] is None


def test_a_mixture_of_thousands_of_experts_is_small(tmp_path: Path) -> None:
    """Some 115 bytes a matrix: 2.3 MB for the 18,432 of 48 layers with 128 experts."""
    shape = (768, 2048)
    units = tuple(
        UnitInfo(name, (name,), (shape,), f"mlp.experts.{kind}", layer)
        for layer in range(5)
        for expert in range(128)
        for kind in ("gate_proj", "up_proj", "down_proj")
        for name in (f"model.layers.{layer}.mlp.experts.{expert}.{kind}",)
    )
    run = RunData.load(fake_run(tmp_path, units, measured=False))
    data = data_of(run)
    assert len(data["frontier"]["bytes"]) == MOST_STOPS
    assert len(json.dumps(data, separators=(",", ":"))) < 115 * len(units) + 80_000

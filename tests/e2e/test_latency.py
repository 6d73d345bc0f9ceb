"""Time as a user meets it: predicted for a device, limited, minimized, measured, fitted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from bitplan.__main__ import app
from bitplan._base.progress import Reporter
from bitplan.jobs.held_out import run_eval
from bitplan.kernels.latency import Device
from bitplan.reports.summary import baselines
from bitplan.search.limits import Limits
from bitplan.search.plan import Plan
from bitplan.search.solve import solve
from bitplan.sensitivity.table import SensitivityTable

SMALL = ["--sequences", "32", "--length", "64", "--guard", "16", "--eval-tokens", "2048"]
SMALL += ["--bootstrap", "0", "--device", "cpu", "--quiet"]


def inside(*arguments: object) -> str:
    """Run a command in this process; what it printed, on one line."""
    words = [*map(str, arguments)]
    with mock.patch.object(sys, "argv", ["bitplan", *words]):
        result = CliRunner().invoke(app, words)
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def profile(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latency") / "run"
    inside("profile", tiny_folder, "--out", folder, "--sequences", "32", "--length", "64", "-q")
    return folder / "profile.safetensors"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device where the bytes of tiny matrices matter: everything but the launch is slow."""
    h200 = Device.load("h200")
    slow = {
        name: h200.bandwidth.model_copy(update={"value": 1e-4 * getattr(h200, name).value})
        for name in ("bandwidth", "peak", "issue_rate")
    }
    h200.model_copy(update=slow).save(tmp_path / "slow.toml")
    return tmp_path / "slow.toml"


def predicted(profile: Path, plan: Plan, device: Path) -> float:
    table = SensitivityTable.load(profile)
    formats = [table.formats.index(plan.assignments[unit.modules[0]]) for unit in table.units]
    limits = Limits(device=Device.load(str(device)))
    time = limits.milliseconds(table, table.kl >= 0)
    return float(sum(time[u, f] for u, f in enumerate(formats)))


def test_a_search_within_bytes_and_time(tiny_folder: Path, profile: Path, device: Path) -> None:
    free = solve(profile, "5bpw", limits=Limits(device=Device.load(str(device))))
    assert free.latency is not None and free.latency.max_ms is None
    # The second-fastest thing there could be: between the least time and that of the free plan.
    least = solve(
        profile, None, max_kl=1e9, fastest=True, limits=Limits(device=Device.load(str(device)))
    )
    assert least.latency is not None
    asked = round((least.latency.ms + free.latency.ms) / 2, 4)
    said = inside(
        "search",
        tiny_folder,
        "--out",
        profile.parent,
        *SMALL,
        *("--budget", "5bpw", "--latency-device", device, "--max-ms", asked),
    )
    plan = Plan.load(profile.parent / "plan.json")
    assert plan.latency is not None and plan.latency.max_ms == asked
    assert plan.bytes <= plan.budget.bytes
    assert plan.latency.ms <= asked < free.latency.ms
    assert plan.latency.ms == pytest.approx(predicted(profile, plan, device), rel=1e-9)
    assert plan.predicted_kl >= free.predicted_kl
    assert f"{plan.latency.ms:.4g} ms per token in the planned matrices, on slow:planepack" in said
    assert f"(at most {asked:g} ms)" in said
    assert "launch, eta_bandwidth, eta_issue, eta_peak assumed; instructions counted" in said
    for baseline in plan.baselines:
        assert baseline.ms is not None and baseline.ms <= asked
    assert "slow:planepack" in (profile.parent / "report.html").read_text(encoding="utf-8")


def test_the_fastest_plan_of_a_measured_kl(tiny_folder: Path, profile: Path, device: Path) -> None:
    said = inside(
        "search",
        tiny_folder,
        "--out",
        profile.parent,
        *SMALL,
        *("--max-kl", "0.05", "--fastest", "--latency-device", device),
    )
    plan = Plan.load(profile.parent / "plan.json")
    assert plan.measured is not None and plan.latency is not None
    assert plan.measured.kl <= 0.05
    assert plan.budget.text == "KL <= 0.05, fastest"
    assert "target KL <= 0.05, fastest" in said and "(the fastest)" in said
    assert plan.latency.max_ms == plan.latency.ms
    slower = [b for b in plan.baselines if b.ms is not None and b.ms > plan.latency.ms]
    assert slower, "the next uniform format is measured as well"
    assert not any(row.fits for row in baselines(plan) if row.name in {b.name for b in slower})
    faster = Limits(device=Device.load(str(device)), max_ms=0.99 * plan.latency.ms)
    solve(profile, "16bpw", limits=faster).save(profile.parent / "faster.json")
    _, result, _ = run_eval(
        profile.parent / "faster.json", "builtin", plan.measured.tokens, "cpu", Reporter(True)
    )
    assert result.mean_kl > 0.05, "what is 1 % faster does not reach the target"


def test_what_ifs_on_a_profile(profile: Path, device: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ("--latency-device", device, "--max-kl", "0.1", "--fastest")
    said = inside("solve", profile, *options, "--out", out)
    plan = Plan.load(out)
    assert plan.latency is not None and plan.predicted_kl <= 0.1
    assert "(the fastest)" in said and "is predicted to take less than" in said
    smallest = solve(
        profile, "16bpw", max_kl=0.1, solver="bisection", limits=Limits(device=_load(device))
    )
    assert smallest.latency is not None
    assert plan.latency.ms <= smallest.latency.ms
    eight = inside("solve", profile, "--latency-device", device, "--batch", "8")
    assert "per step of 8 tokens" in eight
    with pytest.raises(ValueError, match=r"latency <= 0\.001 ms cannot hold: .* needs latency >="):
        inside("solve", profile, "--latency-device", device, "--max-ms", "0.001")
    with pytest.raises(ValueError, match="--fastest needs --max-kl and times"):
        inside("solve", profile, "--fastest", "--latency-device", device)
    with pytest.raises(ValueError, match="cannot be timed on h200:marlin: Marlin runs codes of 4"):
        inside("solve", profile, "--latency-device", "h200:marlin")


def _load(device: Path) -> Device:
    return Device.load(str(device))


def test_a_bench_writes_its_timings_and_a_device(profile: Path, tmp_path: Path) -> None:
    timings, fitted = tmp_path / "bench.json", tmp_path / "mine.toml"
    said = inside(
        *("kernels", "bench", "--device", "cpu", "--bits", "3,4,16", "--m", "1,4", "--quiet"),
        *("--n", "96,160", "--k", "128,64", "--seconds", "0.01", "--json", timings),
        *("--refit", fitted),
    )
    rows = json.loads(timings.read_text())["rows"]
    assert len(rows) == 3 * 2 * 2
    assert {(row["n"], row["k"]) for row in rows} == {(96, 128), (160, 64)}
    for row in rows:
        assert set(row) == {"bits", "m", "n", "k", "seconds", "speedup_vs_fp32"}
        assert 0 < row["seconds"] < 1 and row["speedup_vs_fp32"] > 0
    device = Device.read(fitted)
    assert (device.launch.basis, device.family) == ("fitted", "cpu")
    assert "Latency model mine" in said and "96 x 128" in said
    only = ("--formats", "int4-g64-asym", "--budget", "6bpw")
    plan_said = inside("solve", profile, "--latency-device", fitted, *only)
    assert "on mine:packed" in plan_said
    with pytest.raises(ValueError, match=r"runs codes of 3, 4 bits, not of"):
        inside("solve", profile, "--latency-device", fitted)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--bits", "9"], "Widths are 1 to 8, and 16 for bf16; 9 was given"),
        (["--m", "many"], "--m 'many' must be whole numbers"),
        (["--m", "0"], "all must be at least 1"),
        (["--n", "64,128", "--k", "64"], "--n gives 2 matrices and --k 1"),
        (["--tune"], "Only launches on a GPU are tuned"),
        (["--refit", "mine.json"], "would not be a .toml file"),
    ],
)
def test_a_bench_that_cannot_be(options: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        inside("kernels", "bench", "--device", "cpu", "--quiet", *options)


def test_devices_are_listed_with_how_sure_they_are() -> None:
    said = inside("kernels", "devices")
    assert "h100" in said and "a800:humming" in said
    assert "fitted" in said and "assumed" in said

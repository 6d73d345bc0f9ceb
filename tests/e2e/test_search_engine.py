"""The search engine as a user meets it: goals, limits, kills, locks and workers."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pulp
import pytest
from optuna.trial import TrialState
from safetensors.numpy import load_file
from typer.testing import CliRunner

from bitplan.__main__ import app
from bitplan._base.progress import Reporter
from bitplan.jobs.held_out import run_eval
from bitplan.jobs.job import read_log
from bitplan.jobs.listing import list_jobs
from bitplan.jobs.record import JobRecord
from bitplan.quantizers.format import Format
from bitplan.search.blackbox.study import open_study
from bitplan.search.frontier import Frontier
from bitplan.search.limits import Limits
from bitplan.search.plan import Plan
from bitplan.search.problem import Problem
from bitplan.search.solve import solve
from bitplan.search.solvers import SOLVERS
from bitplan.sensitivity.table import SensitivityTable

PROFILE = "profile.safetensors"
PARTS = ("scales", "biases")  # besides the weight, of a matrix in a folder for MLX
SMALL = ["--sequences", "32", "--length", "64", "--guard", "16", "--eval-tokens", "2048"]
SMALL += ["--bootstrap", "20", "--device", "cpu", "--quiet"]
SMALL += ["--rounding", "rtn"]  # searches are tested here, not what rounds
REFINED = ["--budget", "3bpw", "--refine", "2"]
OUTSIDE = 5 * 64 * 4  # bytes of the five norms, which no plan changes
PATIENCE = 600  # seconds that anything here may take on a busy machine


def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bitplan", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, cwd=cwd)
    said, complaints = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess([], process.returncode, said, " ".join(complaints.split()))


def search(model: Path, folder: Path, *arguments: str | Path) -> Plan:
    """Search in ``folder``, called by its bare name so that recorded commands can be compared."""
    done = run("search", model, "--out", folder.name, *SMALL, *arguments, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return Plan.load(folder / "plan.json")


def inside(*arguments: str | Path) -> str:
    """Run a command in this process, which has torch loaded already; what it printed."""
    words = [*map(str, arguments)]
    with mock.patch.object(sys, "argv", ["bitplan", *words]):
        result = CliRunner().invoke(app, words)
    if result.exception is not None:
        raise result.exception
    return result.output


def search_inside(model: Path, folder: Path, *arguments: str | Path) -> Plan:
    inside("search", model, "--out", folder, *SMALL, *arguments)
    return Plan.load(folder / "plan.json")


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.005)


def stage_is_running(folder: Path, name: str) -> bool:
    try:
        stages = JobRecord.load(folder).stages
    except ValueError:
        return False
    return any(stage.name == name and stage.status == "running" for stage in stages)


def comparable(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return {key: value for key, value in plan.items() if key not in ("created", "versions")}


def said(folder: Path) -> list[str]:
    return [e["fields"]["text"] for e in read_log(folder) if e["event"] == "message"]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refined search that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    search(tiny_folder, folder, *REFINED)
    return folder


@pytest.fixture(scope="module")
def killed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed after the first refinement candidate was measured."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    process = start(
        "search", tiny_folder, "--out", folder.name, *SMALL, *REFINED, cwd=folder.parent
    )

    def is_refining() -> bool:
        return stage_is_running(folder, "refine") and any(
            log.stat().st_size for log in folder.glob("oracle-*.jsonl")
        )

    try:
        wait_until(process, is_refining)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "plan.json").exists()
    return folder


def test_refinement_is_recorded_and_never_worse(whole: Path) -> None:
    plan = Plan.load(whole / "plan.json")
    assert plan.bpw <= 3.0
    assert plan.measured is not None
    names = {baseline.name for baseline in plan.baselines}
    steps = [e["fields"] for e in read_log(whole) if e["event"] == "refinement candidate"]
    assert steps
    if any(step["accepted"] for step in steps):
        assert plan.refinement is None or plan.refinement.kl_after < plan.refinement.kl_before
        assert (plan.refinement is None) == ("refined plan" in names)
    for baseline in plan.baselines:
        if baseline.bytes <= plan.budget.bytes:
            assert plan.measured.kl <= baseline.kl


@pytest.mark.parametrize("how", ["the same command", "--resume"])
def test_a_killed_search_ends_as_if_it_was_not(
    killed: Path, whole: Path, tiny_folder: Path, tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    profile = (folder / PROFILE).stat().st_mtime_ns
    measured = {log: log.read_bytes() for log in folder.glob("oracle-*.jsonl")}
    assert list_jobs(tmp_path)[0].status == "interrupted"
    if how == "--resume":
        done = run("search", "--resume", folder, "--quiet", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    else:
        search(tiny_folder, folder, *REFINED)
    assert comparable(folder) == comparable(whole)
    assert (folder / PROFILE).stat().st_mtime_ns == profile
    for log, before in measured.items():
        assert log.read_bytes().startswith(before.rpartition(b"\n")[0])
        keys = [tuple(json.loads(line)[:2]) for line in log.read_text().splitlines()]
        assert len(keys) == len(set(keys)), "nothing is measured twice"
    again = [e["fields"] for e in read_log(folder) if e["event"] == "run started"][1]
    assert "profile" in again["finished"] and "refine" not in again["finished"]
    assert any("not computed again" in text for text in said(folder))
    assert {s.status for s in JobRecord.load(folder).stages} == {"done"}


def test_resume_of_what_is_no_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no job in"):
        inside("search", "--resume", tmp_path)


def test_one_process_per_run_folder(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments: list[str | Path] = ["search", tiny_folder, "--out", folder, *SMALL]
    first = start(*arguments, "--length", "16", "--sequences", "4000")
    try:
        wait_until(first, (folder / "job.json").exists)
        with pytest.raises(ValueError, match=f"in use by process {first.pid}"):
            inside(*arguments)
        assert first.poll() is None
        assert list_jobs(tmp_path)[0].status == "running"
    finally:
        first.kill()
        first.communicate()
    assert list_jobs(tmp_path)[0].status == "interrupted"


def test_the_smallest_plan_of_a_measured_kl(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan = search_inside(tiny_folder, folder, "--max-kl", "0.05")
    assert plan.measured is not None
    assert plan.measured.kl <= 0.05
    smaller = solve(folder / PROFILE, f"{int(0.99 * plan.bytes)}B")
    smaller.save(tmp_path / "smaller.json")
    _, result, _ = run_eval(
        tmp_path / "smaller.json", "builtin", plan.measured.tokens, "cpu", Reporter(quiet=True)
    )
    assert result.tokens == plan.measured.tokens
    assert result.mean_kl > 0.05


def test_weights_and_cache_share_the_memory(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    memory = ["--context", "128", "--batch", "2"]
    plan = search_inside(tiny_folder, folder, "--vram", "90kB", *memory)
    cache = plan.kv_cache
    assert cache is not None and plan.measured is not None
    outside = json.loads((folder / "profile.json").read_text())["provenance"]["outside_bytes"]
    assert outside >= OUTSIDE
    assert plan.resident_bytes is not None and plan.resident_bytes > plan.bytes
    assert plan.total_bytes == plan.resident_bytes + cache.bytes
    assert 0.9 * 90_000 < plan.total_bytes + outside <= 90_000
    assert list(cache.bits) == ["model.layers.0", "model.layers.1"]
    assert (cache.context, cache.batch) == (128, 2)
    # Keys and values of 2 heads of 16 per layer, at least at these bits: scales come on top.
    assert cache.bytes >= sum(2 * 2 * 16 * bits // 8 for bits in cache.bits.values()) * 128 * 2

    def measured(plan: Plan) -> float:
        plan.save(tmp_path / "plan.json")
        _, result, _ = run_eval(tmp_path / "plan.json", "builtin", None, "cpu", Reporter(True))
        return result.mean_kl

    assert measured(plan) == pytest.approx(plan.measured.kl, rel=1e-6)
    weights_only = measured(plan.model_copy(update={"kv_cache": None}))
    if set(cache.bits.values()) != {16}:
        assert weights_only != pytest.approx(plan.measured.kl, rel=1e-6)

    with pytest.raises(ValueError, match=r"30\.0 kB of memory are .* too little") as error:
        search_inside(tiny_folder, tmp_path / "none", "--vram", "30kB", *memory)
    assert "smallest KV cache at 128 tokens" in str(error.value)
    assert not (tmp_path / "none" / PROFILE).exists(), "found out before the slow profile"
    with pytest.raises(ValueError, match="'tpe' cannot plan a KV cache"):
        search_inside(tiny_folder, tmp_path / "tpe", "--vram", "90kB", "--solver", "tpe")
    assert not (tmp_path / "tpe" / PROFILE).exists()


def test_a_plan_for_a_runtime_within_limits(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limits = ["--min", "self_attn.o_proj=int8", "--max", "model.layers.0.mlp.*=int4"]
    limits += ["--ban", "model.layers.1.mlp.down_proj=int4-g32,int8*"]
    plan = search_inside(tiny_folder, folder, "--for", "vllm", "--budget", "8.2bpw", *limits)
    assert plan.runtime == "vllm"
    assert plan.bpw <= 8.2
    formats = plan.assignments
    assert formats["model.embed_tokens"] in ("bf16", "fp16")
    for layer in ("model.layers.0.", "model.layers.1."):
        assert len({formats[f"{layer}self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert len({formats[f"{layer}mlp.{p}_proj"] for p in ("gate", "up")}) == 1
        assert Format.parse(formats[f"{layer}self_attn.o_proj"]).bits >= 8
    for name in ("gate", "up", "down"):
        assert Format.parse(formats[f"model.layers.0.mlp.{name}_proj"]).bits <= 4
    down = formats["model.layers.1.mlp.down_proj"]
    assert down != "int4-g32" and not down.startswith("int8")
    for name in formats.values():
        fmt = Format.parse(name)
        assert fmt.bits in (4, 8, 16)
        assert not (fmt.bits == 8 and name.endswith("-asym"))
    assert plan.measured is not None
    for baseline in plan.baselines:
        if baseline.bytes <= plan.budget.bytes:
            assert plan.measured.kl <= baseline.kl


def test_a_budget_for_a_runtime_counts_what_it_stores(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan = search_inside(tiny_folder, folder, "--for", "mlx", "--budget", "4.8bpw")
    assert 4.6 < plan.bpw <= 4.8
    smallest = Frontier.load(folder / "frontier.json").bytes[0]
    assert all(b.bytes >= smallest for b in plan.baselines)
    text = " ".join(inside("export", folder, "--to", "mlx", "--out", tmp_path / "mlx").split())
    assert "Read back" in text and "stores" not in text
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    parts = [f"{name}.{part}" for name in plan.assignments for part in ("weight", *PARTS)]
    assert sum(tensors[name].nbytes for name in parts if name in tensors) == plan.bytes

    text = inside("quantize", folder / "plan.json", "--out", tmp_path / "packed", "--quiet")
    assert "what mlx stores, not this packing" in " ".join(text.split())
    inside("frontier", folder / PROFILE, "--for", "mlx", "--out", tmp_path / "frontier.json")
    assert Frontier.load(tmp_path / "frontier.json").bytes[0] == smallest

    out = tmp_path / "plan.json"
    few = ["--formats", "int2-g32,int3-g32,int4-g32"]  # that fit every matrix
    inside("solve", folder / PROFILE, "--budget", "4bpw", "--out", out, *few)
    text = " ".join(inside("export", out, "--to", "mlx", "--out", tmp_path / "other").split())
    assert "which are what bitplan itself stores. A plan made with --for mlx counts" in text


def test_limits_on_a_saved_profile(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    limits = ["--pin", "lm_head=int6-g64-asym", "--min", "*.o_proj=int5", "--max", "*.mlp.*=int3"]
    limits += ["--ban", "*=*-g128-asym"]
    inside("solve", whole / PROFILE, "--budget", "4bpw", "--out", out, *limits)
    for name, text in Plan.load(out).assignments.items():
        bits = Format.parse(text).bits
        assert not text.endswith("-g128-asym")
        assert bits >= 5 or not name.endswith("o_proj")
        assert bits <= 3 or ".mlp." not in name
        assert text == "int6-g64-asym" or name != "model.embed_tokens"
    with pytest.raises(ValueError, match=r"--min.*o_prj|o_prj.*--min"):
        inside("solve", whole / PROFILE, "--budget", "4bpw", "--min", "o_prj=int5")


@pytest.mark.parametrize("suffix", ["mps", "lp"])
def test_the_integer_program_is_what_was_solved(whole: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"program.{suffix}"
    inside("solve", whole / PROFILE, "--budget", "3bpw", "--program", path)
    if suffix == "lp":
        assert path.read_text().rstrip().endswith("End")
        return
    variables, program = pulp.LpProblem.fromMPS(str(path))
    table = SensitivityTable.load(whole / PROFILE)
    program.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0))
    assert program.status == pulp.LpStatusOptimal
    choice = np.full(len(table.units), -1)
    for name, variable in variables.items():
        _, u, f = name.split("_")
        if variable.value() > 0.5:
            assert choice[int(u)] == -1
            choice[int(u)] = int(f)
    plan = solve(table, "3bpw")
    found = Problem.from_table(table).evaluate(choice, -np.inf)
    assert found.bytes <= plan.budget.bytes
    assert found.loss == pytest.approx(plan.predicted_kl, rel=1e-4)


def test_jobs_lists_what_was_done_and_what_failed(
    tiny_folder: Path, whole: Path, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "good")
    shutil.copytree(killed, tmp_path / "cut")
    with pytest.raises(ValueError, match="below the smallest possible plan"):
        search_inside(tiny_folder, tmp_path / "bad", "--budget", "1bpw")
    listed = {job.folder.name: job for job in list_jobs(tmp_path)}
    states = {name: job.status for name, job in listed.items()}
    assert states == {"good": "done", "cut": "interrupted", "bad": "failed"}
    assert listed["good"].bpw == Plan.load(whole / "plan.json").bpw
    shown = inside("jobs", tmp_path)
    assert all(status in shown for status in states.values())
    failure = [e for e in read_log(tmp_path / "bad") if e["event"] == "run failed"]
    assert "below the smallest possible plan" in failure[0]["fields"]["error"]


WORKER = """
import sys, time
from pathlib import Path
import optuna
import bitplan.jobs.worker
from bitplan.__main__ import main
from bitplan.models.load import load_model

log, model, sys.argv = Path(sys.argv[1]), sys.argv[2], ["bitplan", *sys.argv[3:]]
load_model(model, "cpu")  # everything is imported before the search begins
print("ready", flush=True)
while not (log.is_file() and "Share the work" in log.read_text()):
    time.sleep(0.02)
main()
"""


def test_a_search_shared_with_a_worker(tiny_folder: Path, tmp_path: Path) -> None:
    trials = 40
    storage = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    shared = ["--storage", storage, "--study", "together"]
    helper = [sys.executable, "-c", WORKER, str(tmp_path / "run" / "job.log"), str(tiny_folder)]
    worker = subprocess.Popen(
        [*helper, "worker", *shared, "--device", "cpu", "--quiet"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        tokens = ["--search-tokens", str(trials * 16 * 64)]
        goal = ["--solver", "tpe", "--budget", "3.2bpw", "--refine", "0"]
        plan = search(tiny_folder, tmp_path / "run", *goal, *tokens, *shared)
        told, _ = worker.communicate(timeout=PATIENCE)
    finally:
        worker.kill()
    assert worker.returncode == 0
    assert plan.bpw <= 3.2
    study = open_study(storage, "together", "tpe")
    complete = [t for t in study.get_trials() if t.state == TrialState.COMPLETE]
    assert len(complete) == trials
    ran = [int(t.user_attrs["worker"].rpartition(":")[2]) for t in complete]
    assert len(set(ran)) == 2 and worker.pid in ran
    number = re.search(r"this worker ran (\d+) of its trials", " ".join(told.split()))
    assert number is not None and int(number[1]) == ran.count(worker.pid)


@pytest.mark.filterwarnings("ignore:Cross-unit covariances do not help")
@pytest.mark.parametrize("name", SOLVERS.names())
def test_every_solver_on_a_saved_profile(whole: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "plan.json"
    arguments: list[str | Path] = ["solve", whole / PROFILE, "--budget", "3.3bpw"]
    arguments += ["--solver", name, "--out", out]
    if name == "bisection":
        with pytest.raises(ValueError, match="give --max-kl"):
            inside(*arguments)
        arguments += ["--max-kl", "0.9"]
    inside(*arguments)
    plan = Plan.load(out)
    assert plan.bytes <= plan.budget.bytes
    assert plan.solver == name
    assert plan.predicted_kl <= 0.9 or name != "bisection"
    assert plan.lower_bound_kl <= plan.predicted_kl
    best = solve(whole / PROFILE, "3.3bpw")
    assert best.lower_bound_kl <= plan.predicted_kl * (1 + 1e-9)
    sizes = Problem.from_table(SensitivityTable.load(whole / PROFILE))
    assert plan.bytes >= sizes.smallest_bytes().sum()


def test_limits_of_the_python_interface_are_those_of_the_command_line(whole: Path) -> None:
    limits = Limits(at_least={"*.o_proj": "int5"})
    plan = solve(whole / PROFILE, "4bpw", limits=limits)
    none = solve(whole / PROFILE, "4bpw", limits=replace(limits, at_least={}))
    assert none.predicted_kl <= plan.predicted_kl
    assert all(
        Format.parse(plan.assignments[n]).bits >= 5 for n in plan.assignments if "o_proj" in n
    )

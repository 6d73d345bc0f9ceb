from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan.search.frontier import Frontier, UniformPoint
from bitplan.search.hull import lower_hull, undominated
from bitplan.search.problem import Problem
from bitplan.sensitivity.provenance import ModelRef
from bitplan.testing.problems import synthetic_problem

INF = np.inf


def one_unit(points: list[tuple[int, float]]) -> Problem:
    size, loss = zip(*points, strict=True)
    names = tuple(f"f{i}" for i in range(len(points)))
    return Problem(("u",), names, np.array([size]), np.array([loss], dtype=float), weights=8)


@pytest.fixture
def problem() -> Problem:
    """Unit a: 3 hull points and one above the hull; unit b: two useful formats."""
    return Problem(
        units=("a", "b"),
        formats=("f0", "f1", "f2", "f3"),
        bytes=np.array([[10, 20, 30, 25], [10, 14, 20, 30]]),
        loss=np.array([[8.0, 4.0, 2.0, 3.5], [3.0, INF, 2.0, 2.0]]),
        weights=100,
    )


def test_steps_run_from_the_smallest_plan_to_the_best_by_slope(problem: Problem) -> None:
    frontier = Frontier.from_problem(problem)
    assert frontier.start.tolist() == [0, 0]
    assert list(zip(frontier.step_unit, frontier.step_format, strict=True)) == [
        (0, 1),  # 0.4 per byte
        (0, 2),  # 0.2
        (1, 2),  # 0.1; f3 brings nothing more
    ]
    assert frontier.bytes.tolist() == [20, 30, 40, 50]
    assert frontier.predicted_kl.tolist() == [11.0, 7.0, 5.0, 4.0]
    assert [p.tolist() for p in frontier.points()] == [[20, 30, 40, 50], [11.0, 7.0, 5.0, 4.0]]


def test_lower_bound_interpolates_between_plans_and_is_flat_beyond(problem: Problem) -> None:
    frontier = Frontier.from_problem(problem)
    bounds = [frontier.lower_bound(b) for b in (20, 25, 30, 45, 50, 10**9)]
    assert bounds == [11.0, 9.0, 7.0, 4.5, 4.0, 4.0]


def test_at_takes_the_largest_plan_that_fits(problem: Problem) -> None:
    frontier = Frontier.from_problem(problem)
    assert frontier.at(20).tolist() == [0, 0]
    assert frontier.at(39).tolist() == [1, 0]
    assert frontier.at(40).tolist() == [2, 0]
    assert frontier.at(10**9).tolist() == [2, 2]


@pytest.mark.parametrize("ask", ["at", "lower_bound"])
def test_a_budget_below_the_smallest_plan_says_the_minimum(problem: Problem, ask: str) -> None:
    with pytest.raises(ValueError, match=r"9 B is 11 B below .* \(20 B, 1\.600 bits per weight\)"):
        getattr(Frontier.from_problem(problem), ask)(9)


def test_uniform_points_are_the_formats_every_unit_allows(problem: Problem) -> None:
    frontier = Frontier.from_problem(problem)
    assert frontier.uniform == (
        UniformPoint("f0", 20, 11.0),
        UniformPoint("f2", 50, 4.0),
        UniformPoint("f3", 55, 5.5),
    )


@pytest.mark.parametrize(
    ("points", "formats"),
    [
        ([(10, 1.0)], [0]),
        ([(10, 1.0), (10, 0.5), (10, 0.5)], [1]),  # the smallest of equal bytes has least loss
        ([(10, 1.0), (20, 1.0), (30, 1.0)], [0]),  # steps without gain are dropped
        ([(10, 0.0), (20, 1.0)], [0]),
        ([(10, 4.0), (20, 3.9), (30, 0.0)], [0, 2]),  # above the hull
        ([(10, 4.0), (20, 2.0), (30, 0.0)], [0, 1, 2]),  # on a straight line: both steps
        ([(30, 0.0), (10, 4.0), (20, 1.0)], [1, 2, 0]),  # any order of formats
        ([(10, INF), (20, 2.0), (30, 0.0)], [1, 2]),
        ([(0, 1.0), (5, 0.0)], [0, 1]),
        ([(10, -1.0), (20, -3.0)], [0, 1]),
    ],
)
def test_hull_of_one_unit(points: list[tuple[int, float]], formats: list[int]) -> None:
    hull = lower_hull(one_unit(points))
    assert [int(hull.start[0]), *hull.format.tolist()] == formats
    assert (hull.bytes > 0).all()
    assert (hull.gain > 0).all()


def test_hull_steps_are_sorted_and_ordered_within_units() -> None:
    problem = synthetic_problem(300, 12, seed=3)
    hull = lower_hull(problem)
    assert (np.diff(hull.slope) <= 0).all()
    for unit in range(0, 300, 50):
        size = problem.bytes[unit, [hull.start[unit], *hull.format[hull.unit == unit]]]
        assert (np.diff(size) > 0).all()


def test_every_frontier_plan_meets_its_own_numbers() -> None:
    problem = synthetic_problem(40, 12, seed=4)
    frontier = Frontier.from_problem(problem)
    for size, kl in list(zip(frontier.bytes, frontier.predicted_kl, strict=True))[::17]:
        plan = problem.evaluate(frontier.at(int(size)), INF)
        assert plan.bytes == size
        assert plan.loss == pytest.approx(kl, rel=1e-12)


def test_frontier_is_convex() -> None:
    frontier = Frontier.from_problem(synthetic_problem(100, 12, seed=5))
    slopes = -np.diff(frontier.predicted_kl) / np.diff(frontier.bytes)
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(slopes))


def test_undominated_keeps_the_first_of_equals() -> None:
    size = np.array([[10, 10, 20, 20, 5]])
    loss = np.array([[1.0, 1.0, 1.0, 0.5, INF]])
    assert undominated(size, loss).tolist() == [[True, False, False, True, False]]


def test_file_round_trip(problem: Problem, tmp_path: Path) -> None:
    model = ModelRef(id="tiny", sha256="00")
    frontier = Frontier.from_problem(problem, model)
    frontier.save(tmp_path / "frontier.json")
    loaded = Frontier.load(tmp_path / "frontier.json")
    assert loaded.to_json() == frontier.to_json()
    assert loaded.model == model
    assert loaded.uniform == frontier.uniform
    assert loaded.at(45).tolist() == frontier.at(45).tolist()
    assert loaded.lower_bound(45) == frontier.lower_bound(45)


def test_file_of_a_frontier_without_steps_round_trips() -> None:
    frontier = Frontier.from_problem(one_unit([(10, 1.0)]))
    loaded = Frontier.from_json(frontier.to_json())
    assert loaded.bytes.tolist() == [10]
    assert loaded.at(10).tolist() == [0]


def test_file_keeps_every_digit() -> None:
    frontier = Frontier.from_problem(synthetic_problem(50, 12, seed=6))
    loaded = Frontier.from_json(frontier.to_json())
    assert (loaded.predicted_kl == frontier.predicted_kl).all()
    assert (loaded.bytes == frontier.bytes).all()


def test_file_has_the_documented_shape(problem: Problem) -> None:
    data = json.loads(Frontier.from_problem(problem).to_json())
    assert data["schema"] == 1
    assert data["start"] == {"choice": [0, 0], "bytes": 20, "predicted_kl": 11.0}
    assert data["steps"][0] == [0, 1, 30, 7.0]
    assert data["uniform"][0] == {"name": "f0", "bytes": 20, "predicted_kl": 11.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema: Input should be 1"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"steps": [[0, 1, 30, "x"]]}, r"steps\.0\.3"),
        ({"steps": [[0, 9, 30, 7.0]]}, "'formats exist'"),
        ({"steps": [[2, 1, 30, 7.0]]}, "'step units exist'"),
        ({"steps": [[0, 1, 20, 7.0]]}, "'bytes increase'"),
        ({"steps": [[0, 1, 30, 12.0]]}, "'predicted_kl does not increase'"),
        ({"units": ["a"]}, "'start.choice has one format per unit'"),
    ],
)
def test_a_broken_file_names_the_fault(
    problem: Problem, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps(json.loads(Frontier.from_problem(problem).to_json()) | change))
    with pytest.raises(ValueError, match=rf"frontier\.json is not a valid frontier: .*{says}"):
        Frontier.load(path)


def test_a_binary_file_is_no_frontier(tmp_path: Path) -> None:
    (tmp_path / "profile.safetensors").write_bytes(b"\xff\x00")
    says = r"profile\.safetensors is not a frontier \(not a JSON text file\)"
    with pytest.raises(ValueError, match=says):
        Frontier.load(tmp_path / "profile.safetensors")


def test_files_are_utf8_everywhere(problem: Problem, tmp_path: Path) -> None:
    Frontier.from_problem(replace(problem, units=("ä", "b"))).save(tmp_path / "a.json")
    code = (
        "import pathlib, sys; from bitplan.search.frontier import Frontier\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "Frontier.load(folder / 'a.json').save(folder / 'b.json')"
    )
    ascii_locale = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=ascii_locale, check=True)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    assert "ä".encode() in (tmp_path / "b.json").read_bytes()


def test_missing_and_truncated_files(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No frontier at"):
        Frontier.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text(Frontier.from_problem(problem).to_json()[:-20])
    with pytest.raises(ValueError, match="is not a valid frontier"):
        Frontier.load(tmp_path / "half.json")

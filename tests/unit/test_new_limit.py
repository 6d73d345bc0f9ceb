"""The limit that CONTRIBUTING adds in one file is obeyed, shown and refused like ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bitplan.search import limits
from bitplan.search.limits import Limits, build_problem
from bitplan.search.limits._kinds import LIMITS
from bitplan.search.solve import solve

from ..fakes import fake_table, transformer_units

GUIDE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
HEAD = "# search/limits/share.py\n"


@pytest.fixture
def share(tmp_path: Path) -> Iterator[str]:
    code = GUIDE.read_text(encoding="utf-8").partition(HEAD)[2].partition("```")[0]
    (tmp_path / "share.py").write_text(code)
    limits.__path__.append(str(tmp_path))
    importlib.invalidate_caches()
    yield "share"
    limits.__path__.remove(str(tmp_path))
    LIMITS._found.pop("share", None)
    sys.modules.pop(f"{limits.__name__}.share", None)


def test_a_new_kind_of_limit_is_one_file(share: str) -> None:
    table = fake_table(transformer_units(2))
    free = solve(table, "6bpw")
    limited = Limits(others={share: ("int6-g64-asym", 0.2)})

    def used(assignments: dict[str, str]) -> float:
        sizes = {unit.name: unit.weights for unit in table.units}
        chosen = [sizes[n] for n, f in assignments.items() if f == "int6-g64-asym"]
        return sum(chosen) / table.weights

    plan = solve(table, "6bpw", limits=limited)
    assert used(free.assignments) > 0.2 >= used(plan.assignments)
    assert plan.predicted_kl > free.predicted_kl
    (constraint,) = build_problem(table, limited).constraints
    assert constraint.name == "weights in int6-g64-asym"
    assert constraint.cost.shape == table.kl.shape and np.isfinite(constraint.cost).all()
    assert not build_problem(table, Limits()).constraints


def test_a_kind_that_does_not_exist_is_told() -> None:
    with pytest.raises(ValueError, match=r"Unknown limit 'shares'"):
        build_problem(fake_table(transformer_units(1)), Limits(others={"shares": 1}))

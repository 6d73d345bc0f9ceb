"""The page of a GPU check: that of the run in the repository, and figures that are not there."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from bitplan.benchmarks.common import RESULTS
from bitplan.benchmarks.gpu_report import report


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))
    return data


def test_the_page_in_the_repository_is_of_its_figures(found: dict[str, Any]) -> None:
    assert (RESULTS / "gpu.md").read_text(encoding="utf-8") == report(found)


def test_what_was_not_measured_is_a_dash(found: dict[str, Any]) -> None:
    page = report(found)
    prompts = [line.split(" | ") for line in page.splitlines() if "| prompt |" in line]
    assert len(prompts) == 6 and all(cells[4] == "–" != cells[5] for cells in prompts)
    changed = deepcopy(found)
    rows = changed["sections"]["decode"]["rows"]
    (gone,) = (r for r in rows if (r["kernel"], r["n"], r["m"]) == ("torch bf16", 8192, 64))
    rows.remove(gone)
    assert page.count("–") + 1 == report(changed).count("–")


def test_wrong_products_and_slow_ones_stand_out(found: dict[str, Any]) -> None:
    changed = deepcopy(found)
    checks = changed["sections"]["correctness"]
    checks["rows"][0] = {"case": "a case", "failure": "RuntimeError: no kernel"}
    page = report(changed)
    assert page.count("- Wrong: `") == 2 and "- Failed: `a case`: RuntimeError: no kernel" in page
    assert "| 64 | one width | 0.55 to 0.99 | 24 of 24 |" in page

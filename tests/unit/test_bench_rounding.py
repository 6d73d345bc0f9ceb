"""The page of the rounding benchmark: paired ratios, and whose machine it names."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bitplan.benchmarks.bench_rounding import Found, write

SEARCH = Found(
    variant="fisher_gptq",
    budget="3.0bpw",
    seed=0,
    bytes=300,
    bpw=3.0,
    predicted=0.2,
    kl=0.3,
    kl_stderr=0.01,
    also=0.5,
    uniform="int3-g64-asym",
    uniform_kl=0.4,  # on fewer tokens, where the plan has 0.2
    cpu=1.0,
    peak=1,
    uniform_difference=0.2,
    uniform_tokens=1024,
)


def page(folder: Path, *searches: Found) -> tuple[dict[str, float | None], str]:
    """The row of the page, and the page."""
    (folder / "found").mkdir()
    for search in searches:
        path = folder / "found" / f"{search.seed}.json"
        path.write_text(json.dumps(asdict(search)))
    write(folder, folder, 16384)
    (row,) = json.loads((folder / "rounding.json").read_text())["rows"]
    return row, (folder / "rounding.md").read_text()


def test_the_ratio_to_a_uniform_format_is_on_its_tokens(tmp_path: Path) -> None:
    row, _ = page(tmp_path, SEARCH, replace(SEARCH, seed=1, uniform_difference=0.1))
    assert row["of the nearest uniform"] == pytest.approx((0.5 + 0.75) / 2)


def test_without_the_difference_there_is_no_ratio(tmp_path: Path) -> None:
    row, text = page(tmp_path, SEARCH, replace(SEARCH, seed=1, uniform_difference=None))
    assert row["of the nearest uniform"] is None and row["KL"] == pytest.approx(0.3)
    assert "cores of" in text, "this machine, where nothing says another"


def test_a_page_names_the_machine_of_the_searches(tmp_path: Path) -> None:
    machine = {"cpu": "Some CPU", "cores": 77, "system": "Linux"}
    made = {"machine": machine, "versions": {"torch": "9.9"}, "commit": "abc"}
    (tmp_path / "origin.json").write_text(json.dumps(made))
    (tmp_path / "notes.txt").write_text("One was stopped.\n")
    _, text = page(tmp_path, replace(SEARCH, device="Some GPU"))
    assert "77 cores of Some CPU" in text and "commit abc; torch 9.9" in text
    assert "Ran on Some GPU." in text and "One was stopped." in text

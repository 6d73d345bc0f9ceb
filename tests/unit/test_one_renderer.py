"""One run, one source of renderings: nothing is fitted twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch import Tensor

from bitplan._base.progress import Reporter
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, str]]:
    """Counts the fits of every weight and format from here on."""
    counted: Counter[tuple[int, str]] = Counter()
    fit_grid = METHODS.trait("rtn", "grid")

    def counting(weight: Tensor, fmt: Format) -> object:
        counted[weight.data_ptr(), fmt.name] += 1
        return fit_grid(weight, fmt)

    monkeypatch.setitem(METHODS._traits, "rtn", {"grid": counting})
    return counted


def test_a_search_fits_every_matrix_and_format_once(
    tiny_folder: Path, tmp_path: Path, fits: Counter[tuple[int, str]]
) -> None:
    formats = ("int2-g64", "int4-g64-asym", "bf16")
    settings = ProfileSettings(str(tiny_folder), formats=formats, sequences=8, length=32)
    search = SearchSettings(budget="4bpw", refine=1, guard=8, eval_tokens=256, bootstrap=0)
    run_search(settings, search, tmp_path / "run", Reporter(quiet=True))
    assert len(fits) == 15 * len(formats)  # 7 matrices in each of 2 layers, and the embedding
    assert set(fits.values()) == {1}

"""The search benchmark: shared passes against the metrics' own, kept figures, ratios, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan._base.progress import Reporter
from bitplan.benchmarks.common import write_results
from bitplan.benchmarks.search_fused import GROUPS, _plan
from bitplan.benchmarks.search_heldout import heldout
from bitplan.benchmarks.search_lab import Lab, Settings, ratio
from bitplan.benchmarks.search_rivals import PASSES, table_of
from bitplan.models.texts import builtin_prose
from bitplan.search.problem import Problem
from bitplan.search.solvers import SOLVERS
from bitplan.sensitivity.estimate import profile

IN_NATS = ("fisher", "fisher_probe", "fisher_diagonal", "fisher_trace")


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data = tmp_path_factory.mktemp("data")
    (data / "wikitext-2").mkdir()
    (data / "wikitext-2" / "valid.txt").write_text(builtin_prose("calibration"))
    (data / "wikitext-2" / "test.txt").write_text(builtin_prose("evaluation"))
    return Settings(data, tmp_path_factory.mktemp("work"), str(tiny_folder), 7, 256)


@pytest.fixture(scope="module")
def lab(settings: Settings) -> Lab:
    return Lab(settings, Reporter(quiet=True))


@pytest.mark.parametrize("metric", [name for names in PASSES for name in names])
def test_a_shared_pass_gives_the_tables_of_profiles(lab: Lab, metric: str) -> None:
    formats = [fmt.name for fmt in lab.formats]
    plain = profile(
        lab.model, lab.calibration(1), formats, metric=metric, include=["model.layers.*"], seed=1
    )
    table = table_of(lab, metric, 1)
    assert (table.units, table.formats) == (plain.units, plain.formats)
    np.testing.assert_array_equal(table.bytes, plain.bytes)
    scale = 1.0 if metric in IN_NATS else float(plain.kl.sum() / table.kl.sum())
    np.testing.assert_allclose(scale * table.kl, plain.kl, rtol=1e-5)
    np.testing.assert_allclose(scale * table.stderr, plain.stderr, rtol=1e-4)
    assert (table.scores is None) == (plain.scores is None)
    if table.scores is not None and plain.scores is not None:
        atol = 1e-5 * float(np.abs(plain.scores).max())
        np.testing.assert_allclose(scale**0.5 * table.scores, plain.scores, rtol=1e-4, atol=atol)
    assert (table.diagonal is None) == (plain.diagonal is None)
    if table.diagonal is not None and plain.diagonal is not None:
        np.testing.assert_allclose(table.diagonal, plain.diagonal, rtol=1e-6)
    assert table.provenance == plain.provenance
    for budget in ("3.28bpw", "4.3bpw"):
        first, second = (
            SOLVERS.get("certified")(Problem.from_table(t), lab.max_bytes(budget)).choice
            for t in (table, plain)
        )
        np.testing.assert_array_equal(first, second)


def test_measured_plans_are_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {"coarse": lab.uniform("3.28bpw"), "fine": lab.uniform("4.3bpw")}
    first = lab.measure(plans)
    assert first["coarse"].mean_kl > first["fine"].mean_kl > 0
    monkeypatch.delattr("bitplan.benchmarks.search_lab.measure")  # no plan is measured again
    again = lab.measure(plans)
    for name in plans:
        np.testing.assert_array_equal(again[name].kl, first[name].kl)
        assert again[name].tokens == first[name].tokens == 256


def test_plans_are_priced_by_the_sequences_of_other_seeds(lab: Lab) -> None:
    rows = heldout(lab).tables["Prices of other sequences"]
    row = next(r for r in rows if (r["budget"], r["score"]) == ("4.3bpw", "fisher_probe"))
    tables = [table_of(lab, "fisher_probe", seed) for seed in range(3)]
    units = np.arange(len(lab.units))
    expected = []
    for seed, table in enumerate(tables):
        solution = SOLVERS.get("certified")(Problem.from_table(table), lab.max_bytes("4.3bpw"))
        others = [t.kl[units, solution.choice].sum() for i, t in enumerate(tables) if i != seed]
        expected.append(np.mean(others))
    assert row["by other sequences"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert row["predicted"] < row["by other sequences"]  # the winner's curse


@pytest.mark.parametrize("score", ["fisher", "output_fisher"])
def test_fused_plans_fuse_and_keep_the_budget(lab: Lab, score: str) -> None:
    for groups in ((), GROUPS):
        choice = _plan(lab, "3.28bpw", score, groups, 1)
        assert lab.bpw(choice) <= 3.28
        formats: dict[tuple[int | None, str], set[int]] = {}
        for unit, f in zip(lab.units, choice.tolist(), strict=True):
            for rule in GROUPS:
                if unit.name.rpartition(".")[2] in rule.split(","):
                    formats.setdefault((unit.layer, rule), set()).add(f)
        assert len(formats) == 2 * len({unit.layer for unit in lab.units})
        assert (max(map(len, formats.values())) == 1) == bool(groups)


def test_figures_of_other_settings_are_refused(lab: Lab, settings: Settings) -> None:
    other = Settings(settings.data, settings.work, settings.model, 6, settings.tokens)
    with pytest.raises(ValueError, match="another calibration"):
        Lab(other, Reporter(quiet=True))


def test_the_error_of_a_ratio_is_that_of_repeated_experiments() -> None:
    rng = np.random.default_rng(0)
    level = rng.gamma(4.0, size=(2000, 200))
    first, second = (level * rng.gamma(50.0, 0.02 * mean, size=level.shape) for mean in (0.6, 1.0))
    found = [ratio(a, b) for a, b in zip(first, second, strict=True)]
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(0.6, rel=2e-3)
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)


def test_named_tables_are_written_under_their_headings(tmp_path: Path) -> None:
    tables: dict[str, list[dict[str, Any]]] = {
        "First": [{"a": 1, "b": 2.5}],
        "Second": [{"c": None}],
    }
    write_results("some", "Some", rows=[{"d": 7}], tables=tables, out=tmp_path)
    lines = (tmp_path / "some.md").read_text().splitlines()
    for heading, head, row in (
        ("# Some", "| d |", "| 7 |"),
        ("## First", "| a | b |", "| 1 | 2.5 |"),
        ("## Second", "| c |", "| – |"),
    ):
        at = lines.index(heading)
        assert (lines[at + 2], lines[at + 4]) == (head, row)

"""bitplan report and bitplan compare as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bitplan.__main__ import app
from bitplan.jobs.settings import SearchSettings
from bitplan.reports import study
from bitplan.tests.fakes import fake_run


def typed(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_report_names_what_it_wrote(tmp_path: Path) -> None:
    done = typed("report", fake_run(tmp_path / "a"))
    assert done.exit_code == 0
    assert "report.html" in done.stdout
    assert (tmp_path / "a" / "prediction.svg").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "Which run"),
        (["report", "x", "--serve", "--study"], "two different pages"),
        (["report", "nowhere", "--serve"], "There is no folder nowhere"),
        (["report", "nowhere", "--study"], "has no Optuna study"),
        (["report", "nowhere"], "No plan at nowhere"),
        (["compare", "nowhere", "nowhere"], "No plan at nowhere"),
    ],
)
def test_bad_input_is_explained(words: list[str], message: str) -> None:
    done = typed(*words)
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


def test_compare_prints_and_writes(tmp_path: Path) -> None:
    a, b = fake_run(tmp_path / "a"), fake_run(tmp_path / "b", budget="3.4bpw")
    done = typed("compare", a, b, "--out", tmp_path / "c.html")
    assert done.exit_code == 0
    assert "of 21 modules change their format" in done.stdout
    assert (tmp_path / "c.html").is_file()


def test_the_dashboard_is_named_without_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "is_installed", lambda: False)
    url = "postgresql://user:geheim@host/studies"
    fake_run(tmp_path, search=SearchSettings(budget="4.3bpw", solver="tpe", storage=url))
    done = typed("report", tmp_path, "--study")
    assert done.exit_code == 0
    assert "pip install optuna-dashboard && optuna-dashboard" in done.stdout
    assert "geheim" not in done.stdout


def test_the_dashboard_is_started_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, words = tmp_path / "optuna-dashboard", tmp_path / "words"
    program.write_text(f"#!/bin/sh\necho \"$@\" > '{words}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    fake_run(tmp_path / "run", search=SearchSettings(budget="4.3bpw", solver="tpe"))
    (tmp_path / "run" / "job.sqlite").touch()
    assert typed("report", tmp_path / "run", "--study", "--port", "8123").exit_code == 0
    assert words.read_text().split() == [
        f"sqlite:///{tmp_path}/run/job.sqlite",
        *("--host", "127.0.0.1", "--port", "8123"),
    ]

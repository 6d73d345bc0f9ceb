"""A model of images is told about samples; only one that reads text about tokens and sequences."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitplan.__main__ import app
from bitplan.reports.html import ASSETS, write_report
from bitplan.search.plan import Plan
from bitplan.tests.fakes import fake_run

OF_TEXT = re.compile(r"\btokens?\b|\bsequences?\b|perplexity|\bppl\b", re.IGNORECASE)
MODELS = """
import torch
from torch import nn
from bitplan import Workload

def images():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    return Workload(model, calibration=list(torch.randn(24, 4, 3, 6, 6)))

def pixels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 5, 1))
    batches = list(torch.randn(24, 4, 3, 6, 6))
    return Workload(model, calibration=batches, logits=lambda output: output.permute(0, 2, 3, 1))
"""
SMALL = ["--formats", "int2-g32,int4-g32,int8-g32", "--device", "cpu", "--bootstrap", "20"]


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def visible(page: Path) -> str:
    text = re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.DOTALL)
    return html.unescape(text)


def test_images_are_samples_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    model, folder = "net.py:images", tmp_path / "a"
    said = run("search", model, "--budget", "5bpw", "--refine", "1", "--out", folder, *SMALL)
    plan = Plan.load(folder / "plan.json")
    assert plan.measured is not None and plan.measured.tokens == 24
    assert plan.calibration["per"] == "sample"
    assert "36 calibration samples" in said
    assert "36 further samples to round by" in said
    assert "nats per sample on 24 held-out samples" in said
    assert "Measured on the same samples" in said
    said += run("eval", folder)
    said += run("profile", model, "--out", tmp_path / "p", *SMALL[:4])
    said += run("frontier", folder / "profile.safetensors")
    run("solve", folder / "profile.safetensors", "--budget", "7bpw", "--out", "b.json")
    said += run("compare", folder, "b.json", "--out", "c.html")
    said += visible(folder / "report.html") + visible(tmp_path / "c.html")
    for figure in ("frontier", "sensitivity", "prediction"):
        said += (folder / f"{figure}.svg").read_text("utf-8")
    assert [line for line in said.splitlines() if OF_TEXT.search(line)] == []
    assert "nats per sample" in visible(tmp_path / "c.html")
    assert '"nats":"nats per sample"' in (folder / "report.html").read_text("utf-8")


def test_several_predictions_of_a_sample_are_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    said = run("search", "net.py:pixels", "--budget", "5bpw", "--out", "a", *SMALL)
    assert "nats per position on 384 held-out positions" in said  # 24 samples of 4 x 4
    assert "36 calibration samples" in said


def test_text_keeps_its_words(tmp_path: Path) -> None:
    """The control: what is looked for above is there where it belongs."""
    write_report(fake_run(tmp_path))
    text = visible(tmp_path / "report.html")
    assert "nats per token" in text and "in sequences of" in text and "perplexity" in text


@pytest.mark.parametrize("script", sorted(ASSETS.glob("*.js")), ids=lambda path: path.name)
def test_scripts_take_their_words_from_the_data(script: Path) -> None:
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", script.read_text("utf-8"), flags=re.DOTALL)
    assert not re.search(r"per token|calibration sequences|more sequences", code)

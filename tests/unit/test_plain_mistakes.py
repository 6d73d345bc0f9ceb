"""What is plainly wrong is refused before a model is loaded and a run folder is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import bitplan
from bitplan.__main__ import app
from bitplan.search.job import run_profile, run_search
from bitplan.search.settings import ProfileSettings, SearchSettings
from bitplan.search.work import prepare
from bitplan.sensitivity.progress import Reporter

WORKLOAD = """
import torch
from bitplan import Workload

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    batches = list(torch.randn(6, 8, 32))
    return Workload(model, calibration=batches[:4], evaluation=batches[4:])
"""


class Said:
    """A listener that keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_text(self, text: str) -> None:
        self.lines.append(text)

    def on_progress(self, description: str, done: int, total: int) -> None:
        pass


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(WORKLOAD)
    return f"{tmp_path / 'net.py'}:make"


@pytest.mark.parametrize(
    ("profile", "search", "message"),
    [
        ({"model": "missing.gguf"}, {}, "No GGUF file"),
        ({"model": "missing.py:make"}, {}, "No Python file"),
        ({"model": "missing"}, {}, "Unknown model"),
        ({"device": "gpu"}, {}, "Unknown device"),
        ({"device": "cuda"}, {}, "no CUDA device"),
        ({"calibration": "no.txt"}, {}, "No text file at no.txt"),
        ({"metric": "taylr"}, {}, "Did you mean 'taylor'"),
        ({"formats": ("int4-g65q",)}, {}, "int4-g65q"),
        ({}, {"evaluation": "no.txt"}, "No text file at no.txt"),
        ({}, {"solver": "certifed"}, "Did you mean 'certified'"),
        ({}, {"budget": "5"}, "Did you mean '5bpw'"),
        ({}, {"budget": None, "vram": "8"}, "has no unit"),
    ],
)
def test_a_plain_mistake_is_refused_at_once(
    model: str, tmp_path: Path, profile: dict[str, Any], search: dict[str, Any], message: str
) -> None:
    if profile.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("has a GPU")
    said, run = Said(), tmp_path / "run"
    settings = replace(ProfileSettings(model, device="cpu"), **profile)
    wanted = SearchSettings(**({"budget": "4bpw"} | search))
    with pytest.raises(ValueError, match=message):
        run_search(settings, wanted, run, Reporter(quiet=True, listener=said))
    if profile:
        with pytest.raises(ValueError, match=message):
            run_profile(settings, run, Reporter(quiet=True, listener=said))
    assert not run.exists()
    assert said.lines == []


def test_refused_commands_leave_a_finished_run_as_it_was(model: str, tmp_path: Path) -> None:
    run, reporter = tmp_path / "run", Reporter(quiet=True)
    settings = ProfileSettings(model, formats=("int4-g32", "int8-g32"), device="cpu")
    wanted = SearchSettings(budget="6bpw", bootstrap=0)
    plan = run_search(settings, wanted, run, reporter)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.suffix != ".log"}
    with pytest.raises(ValueError, match=r"metric.*Choose another --out, which keeps"):
        run_search(replace(settings, metric="taylor"), wanted, run, reporter)
    with pytest.raises(ValueError, match="smallest"):
        run_search(settings, replace(wanted, budget="0.1bpw"), run, reporter)
    after = {p.name: p.read_bytes() for p in run.iterdir() if p.suffix != ".log"}
    assert {k: v for k, v in after.items() if k != "job.lock"} == {
        k: v for k, v in before.items() if k != "job.lock"
    }
    assert run_search(settings, wanted, run, reporter).assignments == plan.assignments


def test_a_workload_says_which_options_it_does_not_use(model: str) -> None:
    settings = ProfileSettings(model, sequences=24, length=32, device="cpu")
    with pytest.warns(UserWarning, match="--sequences, --length not used"):
        prepare(settings, Reporter(quiet=True))
    with pytest.raises(ValueError, match="Leave out --calibration"):
        prepare(replace(settings, calibration=model.removesuffix(":make")), Reporter(quiet=True))


def test_quantize_says_what_it_loads(model: str, tmp_path: Path) -> None:
    settings = ProfileSettings(model, formats=("int4-g32", "int8-g32"), device="cpu")
    wanted = SearchSettings(budget="6bpw", bootstrap=0)
    plan = run_search(settings, wanted, tmp_path / "run", Reporter(quiet=True))
    said = Said()
    bitplan.quantize(plan, tmp_path / "packed", reporter=Reporter(quiet=True, listener=said))
    assert said.lines[0] == f"Loading {plan.model.id}"


def test_the_version_is_shown() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output.strip()) == (0, f"bitplan {bitplan.__version__}")

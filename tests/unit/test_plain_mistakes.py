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
from bitplan._base.progress import Reporter
from bitplan.jobs.prepare import prepare
from bitplan.jobs.search import run_profile, run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings

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
        ({"model": "./missing"}, {}, "No folder at ./missing"),
        ({"model": "/no/model"}, {}, "No folder at /no/model"),
        ({"model": __file__}, {}, r"is a Python file: .*\.py:FUNCTION"),
        ({"device": "gpu"}, {}, "Unknown device"),
        ({"device": "cuda"}, {}, "no CUDA device"),
        ({"calibration": "no.txt"}, {}, "No text file at no.txt"),
        ({"calibration": "code:0.5,no.txt:0.5"}, {}, "No text file at no.txt"),
        ({"calibration": "code:0.5,chat:-1"}, {}, "weight of 'chat' is -1"),
        ({"metric": "taylr"}, {}, "Did you mean 'taylor'"),
        ({"formats": ("int4-g65q",)}, {}, "int4-g65q"),
        ({}, {"evaluation": "no.txt"}, "No text file at no.txt"),
        ({}, {"evaluation": "mixture"}, "No text file at mixture"),
        ({}, {"eval_also": "no.txt"}, "No text file at no.txt"),
        ({}, {"solver": "certifed"}, "Did you mean 'certified'"),
        ({}, {"budget": "5"}, "Did you mean '5bpw'"),
        ({}, {"budget": None, "vram": "8"}, "has no unit"),
        ({}, {"solver": "tpe", "storage": "job.sqlite"}, "is not a storage URL"),
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


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"budget": None, "max_ppl": 20.0}, "reads no text. Use --max-kl"),
        ({"budget": None, "vram": "1GB"}, "--vram plans a KV cache.*reads no text"),
        ({"runtime": "gptq"}, r"gptq runs 2 of 2 units in no smaller format.*'0' fails.*--exclude"),
    ],
)
def test_what_a_model_cannot_have_is_refused_before_its_profile(
    model: str, tmp_path: Path, search: dict[str, Any], message: str
) -> None:
    settings = ProfileSettings(model, formats=("int5-g32", "bf16"), device="cpu")
    with pytest.raises(ValueError, match=message):
        wanted = SearchSettings(**({"budget": "6bpw"} | search))
        run_search(settings, wanted, tmp_path / "run", Reporter(quiet=True))
    assert not (tmp_path / "run" / "profile.safetensors").exists()


def test_a_run_folder_that_cannot_be_is_refused_at_once(model: str, tmp_path: Path) -> None:
    said, file = Said(), tmp_path / "file"
    file.touch()
    reporter = Reporter(quiet=True, listener=said)
    for place in (file, file / "run"):
        with pytest.raises(ValueError, match="file is a file, not a folder"):
            run_profile(ProfileSettings(model), place, reporter)
        with pytest.raises(ValueError, match="file is a file, not a folder"):
            run_search(ProfileSettings(model), SearchSettings(budget="4bpw"), place, reporter)
    assert said.lines == []


@pytest.mark.parametrize(
    ("code", "message"),
    [("import nothing_of_this_name", "ModuleNotFoundError"), ("def make(:", "SyntaxError")],
)
def test_a_model_file_with_a_mistake_is_named(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(ValueError, match=rf"bad.py cannot be imported \({message}: .*Run python"):
        prepare(ProfileSettings(f"{tmp_path / 'bad.py'}:make"), Reporter(quiet=True))


def test_refused_commands_leave_a_finished_run_as_it_was(model: str, tmp_path: Path) -> None:
    run, reporter = tmp_path / "run", Reporter(quiet=True)
    settings = ProfileSettings(model, formats=("int4-g32", "int8-g32"), device="cpu")
    wanted = SearchSettings(budget="6bpw", bootstrap=0)
    plan = run_search(settings, wanted, run, reporter)

    def kept() -> dict[Path, bytes]:
        files = (path for path in run.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files if path.suffix not in (".log", ".lock")}

    before = kept()
    with pytest.raises(ValueError, match=r"metric.*Choose another --out, which keeps"):
        run_search(replace(settings, metric="taylor"), wanted, run, reporter)
    with pytest.raises(ValueError, match="smallest"):
        run_search(settings, replace(wanted, budget="0.1bpw"), run, reporter)
    assert kept() == before
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

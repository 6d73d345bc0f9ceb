"""A checkpoint's own code runs where the user says so: not by what files and records say."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import bitplan
from bitplan.__main__ import app
from bitplan._base.progress import Reporter
from bitplan.jobs import search as searching
from bitplan.jobs import worker as working
from bitplan.jobs.forecast import forecast
from bitplan.jobs.job import Job
from bitplan.jobs.materialize import load_packed, quantize
from bitplan.jobs.search import run_profile
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.models.find import find_units
from bitplan.models.load import check_model, load_model
from bitplan.models.trust import code_sha256, is_trusted, trusting
from bitplan.testing.plans import hand_made
from bitplan.tests.faults import tiny
from bitplan.tests.faults.test_models_of_all_kinds import TEXT, with_own_code

LOADERS = ("from_pretrained", "from_config")


class _Captured(Exception):
    """What a job was called with."""


def _capture(settings: ProfileSettings, *_: Any) -> Any:
    raise _Captured(settings)


def recorded(trusted: bool) -> dict[str, Any]:
    profile = ProfileSettings("some/model", trust_remote_code=trusted)
    found: dict[str, Any] = {"profile": asdict(profile), "search": asdict(SearchSettings("4bpw"))}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


@pytest.mark.parametrize("said", [False, True])
def test_what_a_folder_records_gives_no_trust(
    said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job(tmp_path / "run", ["bitplan", "search", "some/model"], recorded(True)):
        pass
    monkeypatch.setattr(searching, "run_search", _capture)
    options = ["--trust-remote-code"] if said else []
    result = CliRunner().invoke(app, ["search", "--resume", str(tmp_path / "run"), *options])
    assert isinstance(result.exception, _Captured), result.output
    assert result.exception.args[0].trust_remote_code is said


def test_what_a_study_records_gives_no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "read_job", lambda *_: recorded(True))
    monkeypatch.setattr(working, "prepare", _capture)
    with pytest.raises(_Captured) as found:
        working.run_worker("sqlite://", None, "cpu", Reporter(quiet=True))
    assert found.value.args[0].trust_remote_code is False


def test_trust_ends_with_the_job_and_is_not_recorded(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    settings = ProfileSettings(
        str(with_own_code(tmp_path / "m", "Llama")),
        ("int4-g32", "int8-g32"),
        metric="fisher",
        rounding="rtn",
        calibration=str(tmp_path / "text.txt"),
        sequences=2,
        length=16,
        device="cpu",
        trust_remote_code=True,
    )
    assert list(forecast(settings, SearchSettings("5bpw"))) and not is_trusted()
    run_profile(settings, tmp_path / "run", Reporter(quiet=True))
    assert not is_trusted()
    said = json.loads((tmp_path / "run" / "job.json").read_text())
    assert said["settings"]["profile"]["trust_remote_code"] is False


def test_a_packed_folder_runs_no_file_of_its_own(tmp_path: Path) -> None:
    model = load_model(str(tiny.save(tmp_path / "m")), "cpu")
    names = [u.name for u in find_units(model.module) if "layers" in u.name]
    packed = quantize(
        hand_made(model, dict.fromkeys(names, "int4-g32")), tmp_path / "packed", model
    )
    (packed / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    plan = json.loads((packed / "plan.json").read_text())
    plan["model"]["id"] = f"{packed}/evil.py:make"
    (packed / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"own \(evil.py\).*--trust-remote-code"):
        load_packed(packed)
    assert not (tmp_path / "ran").exists()


def test_code_of_another_repository_is_named_and_counts(tmp_path: Path) -> None:
    folder, found = with_own_code(tmp_path / "m", "Llama"), set()
    for name in ("first", "second"):
        other = tmp_path / name
        other.mkdir()
        shutil.copy(folder / "configuration_own.py", other)
        (other / "modeling_own.py").write_text(
            (folder / "modeling_own.py").read_text() + f"# {name}"
        )
        own = {"AutoConfig": f"{other}--configuration_own.OwnConfig"}
        own["AutoModelForCausalLM"] = f"{other}--modeling_own.OwnForCausalLM"
        tiny.configure(folder, auto_map=own)
        said = rf"\(configuration_own.py of {other}, modeling_own.py of {other}\)"
        with pytest.raises(ValueError, match=said):
            check_model(str(folder))
        with trusting():
            found.add(code_sha256(folder, load_model(str(folder), "cpu").module))
    assert len(found) == 2 and None not in found


def test_packing_without_trust_says_so(tmp_path: Path) -> None:
    with trusting():
        model = load_model(str(with_own_code(tmp_path / "m", "Llama")), "cpu")
    names = [u.name for u in find_units(model.module) if "layers" in u.name]
    plan = hand_made(model, dict.fromkeys(names, "int4-g32"))
    with pytest.raises(ValueError, match=r"^\S+ has modelling code of its own"):
        quantize(plan, tmp_path / "packed", model)


def test_code_that_transformers_has_itself_is_not_taken_from_a_folder(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", "Phi3")
    (folder / "modeling_phi3.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tiny.change(folder, tiny.to_fp8((16, 16)))
    tiny.configure(
        folder,
        auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        quantization_config=tiny.fp8_config((16, 16)),
    )
    assert type(load_model(str(folder), "cpu").module).__name__ == "Phi3ForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_every_loader_says_whether_code_is_trusted() -> None:
    root, calls, silent = Path(bitplan.__file__).parent, 0, []
    for part in ("models", "jobs", "exporters"):
        for file in sorted((root / part).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _is_loader(node.func):
                    calls += 1
                    given = {keyword.arg for keyword in node.keywords}
                    if not given & {"trust_remote_code", "gguf_file", None}:  # None is **options
                        silent.append(f"{file.relative_to(root)}:{node.lineno}")
    assert calls > 8 and not silent


def _is_loader(called: ast.expr) -> bool:
    if not isinstance(called, ast.Attribute) or called.attr not in LOADERS:
        return False
    taken = called.value.func if isinstance(called.value, ast.Call) else called.value
    return isinstance(taken, ast.Name) and taken.id.startswith(("Auto", "loader_of"))

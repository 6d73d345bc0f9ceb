"""The whole job on a tiny trained model, as a user meets it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import bitplan
from bitplan._base.progress import Reporter
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.models.load import load_model
from bitplan.search.frontier import Frontier
from bitplan.search.plan import Plan

FILES = {
    "plan.json",
    "frontier.json",
    *(
        f"{name}.{kind}"
        for name in ("frontier", "allocation", "sensitivity", "prediction")
        for kind in ("png", "svg")
    ),
    "report.html",
    "profile.safetensors",
    "profile.json",
    "measurements.json",
    "measurements-also.json",
    "confidence.json",
    "job.json",
    "job.log",
    "job.lock",
    "renderings",
    "statistics",
}
SMALL = ["--sequences", "24", "--rounding-sequences", "24", "--length", "32"]
SMALL += ["--eval-tokens", "1024", "--quiet"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bitplan", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def job(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    done = run("search", tiny_folder, "--budget", "3.6bpw", "--out", folder, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "bpw" in done.stdout
    return folder


def test_the_run_folder_is_complete(job: Path) -> None:
    assert {p.name for p in job.iterdir()} == FILES


def test_the_plan_keeps_its_promises(job: Path) -> None:
    plan = Plan.load(job / "plan.json")
    assert plan.bytes <= plan.budget.bytes
    assert plan.bpw <= 3.6
    assert plan.gap <= 1e-4 or plan.solver == "uniform"
    assert plan.measured is not None
    for baseline in plan.baselines:
        if baseline.bytes <= plan.budget.bytes:
            assert plan.measured.kl <= baseline.kl, "never worse than uniform"
    assert 0.5 < plan.predicted_kl / plan.measured.kl < 2
    frontier = Frontier.load(job / "frontier.json")
    assert frontier.lower_bound(plan.budget.bytes) <= plan.predicted_kl * (1 + 1e-12)


def test_the_same_command_repeats_nothing_and_changes_nothing(job: Path, tiny_folder: Path) -> None:
    before = (job / "profile.safetensors").read_bytes()
    plan = Plan.load(job / "plan.json")
    (job / "plan.json").unlink()
    (job / "profile.json").unlink()
    (job / "measurements.json").write_text("{trunc")
    done = run("search", tiny_folder, "--budget", "3.6bpw", "--out", job, *SMALL)
    assert done.returncode == 0, done.stderr
    assert (job / "profile.safetensors").read_bytes() == before
    assert (job / "profile.json").is_file()
    again = Plan.load(job / "plan.json")
    assert again.assignments == plan.assignments
    assert again.measured == plan.measured


def test_a_profile_made_with_other_settings_is_not_overwritten(
    job: Path, tiny_folder: Path
) -> None:
    before = (job / "profile.safetensors").read_bytes()
    done = run("search", tiny_folder, "--out", job, *SMALL, "--seed", "1")
    assert done.returncode == 1
    assert "was made with other settings (calibration.seed: 0, now 1)" in " ".join(
        done.stderr.split()
    )
    assert (job / "profile.safetensors").read_bytes() == before


def test_what_if_budgets_need_no_model(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = run("solve", job / "profile.safetensors", "--budget", "2.9bpw", "--out", out)
    assert done.returncode == 0, done.stderr
    assert Plan.load(out).bpw <= 2.9
    other = run("solve", job / "profile.safetensors", "--budget", "2.9bpw", "--solver", "ilp")
    assert other.returncode == 0, other.stderr
    code = (
        "import sys, bitplan; from bitplan.search.solve import solve; "
        f"solve({str(job / 'profile.safetensors')!r}, '3bpw'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert run("frontier", job / "profile.safetensors").returncode == 0


def test_packed_weights_equal_the_plan(job: Path, tiny_folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    done = run("quantize", job / "plan.json", "--out", packed, "--quiet")
    assert done.returncode == 0, done.stderr
    plan = Plan.load(job / "plan.json")

    with safe_open(packed / "model.safetensors", framework="np") as file:
        planned = sum(
            file.get_tensor(name).nbytes
            for name in file.keys()  # noqa: SIM118
            if name.rsplit(".", 1)[0] in plan.assignments
        )
    assert planned == plan.bytes

    model = bitplan.load(packed)
    ids = torch.arange(40).view(2, 20)
    original = load_model(str(tiny_folder), "cpu").module
    applied = bitplan.apply(original, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, applied(ids).logits)
        text = model.generate(ids[:, :4], max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert text.shape == (2, 8)

    for target in (packed, job / "plan.json"):
        done = run("eval", target, "--quiet")
        assert done.returncode == 0, done.stderr
        kl = float(done.stdout.split("measured KL")[1].split()[1])
        assert plan.measured is not None
        assert kl == pytest.approx(plan.measured.kl, rel=1e-3)
    assert run("generate", packed, "--prompt", "The", "--max-tokens", "4").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1bpw"], "below the smallest possible plan"),
        (["--budget", "4.3bwp"], "is not a unit of"),
        (["--metric", "fischer"], "Did you mean 'fisher'"),
        (["--formats", "int4-g63"], "Did you mean"),
        (["--solver", "certifed"], "Did you mean 'certified'"),
        (["--include", "model.layer.*"], "No layer matches 'model.layer.*'"),
        (["--pin", "lm_head"], "is not GLOB=FORMAT"),
        (["--length", "300"], "reads at most 256 tokens"),
        (["--device", "gpu"], "Unknown device"),
        (["--calibration", "nowhere.txt"], "No text file at nowhere.txt"),
        (["--eval", "nowhere.txt"], "No text file at nowhere.txt"),
        (
            ["--sequences", "100000", "--calibration", "builtin"],
            "sequences of 32 tokens, 100000 are needed",
        ),
    ],
)
def test_bad_input_is_explained_and_found_out_before_the_slow_profile(
    tiny_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    folder = tmp_path / "run"
    done = run("search", tiny_folder, "--out", folder, *SMALL, *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert left <= {"job.json", "job.log", "job.lock"}


def test_a_budget_above_the_largest_plan_says_so(job: Path) -> None:
    done = run("solve", job / "profile.safetensors", "--budget", "30bpw")
    assert done.returncode == 0
    assert "above the largest useful plan" in " ".join(done.stderr.split())


def test_a_plan_for_another_model_names_the_first_mismatch(job: Path, tmp_path: Path) -> None:
    data = json.loads((job / "plan.json").read_text())
    data["assignments"] = {"model.layers.7.mlp.up_proj": "int4-g64-asym"}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    done = run("quantize", path, "--out", tmp_path / "packed", "--quiet")
    assert done.returncode == 1
    assert "assigns 'model.layers.7.mlp.up_proj' a format" in " ".join(done.stderr.split())
    assert not (tmp_path / "packed").exists()


def test_measuring_on_the_calibration_text_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("one two three four " * 2000)
    done = run("search", tiny_folder, "--calibration", text, "--eval", text, *SMALL)
    assert done.returncode == 1
    assert "both --calibration and --eval" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"evaluation": "{0}"}, "{0} is both --calibration and --eval: a plan"),
        ({"eval_also": "{1}"}, "{1} is both --calibration and --eval-also: a plan"),
        ({"evaluation": "code", "eval_also": "code"}, "code is both --eval and --eval-also"),
        ({"eval_also": "prose"}, "prose is both --eval and --eval-also"),
        ({"evaluation": "{2}", "eval_also": "{3}"}, "{3} is both --eval and --eval-also"),
    ],
)
def test_every_text_has_one_part_to_play(
    tiny_folder: Path, tmp_path: Path, asked: dict[str, str], message: str
) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt", "same-as-c.txt")]
    for file, word in zip(files, ("one", "two", "three", "three"), strict=True):
        file.write_text(f"{word} four five six " * 2000)
    texts = f"{files[0]}:0.6,{files[1]}:0.2,code:0.2"
    profile = ProfileSettings(str(tiny_folder), calibration=texts, sequences=10, length=32)
    given = {name: text.format(*files) for name, text in asked.items()}
    search = replace(SearchSettings(budget="4bpw"), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(message.format(*files))):
        run_search(profile, search, tmp_path / "run", Reporter(quiet=True))


def test_quantize_never_replaces_a_run_folder(job: Path) -> None:
    before = sorted(job.iterdir())
    done = run("quantize", job / "plan.json", "--out", job, "--quiet")
    assert done.returncode == 1
    assert "is not a packed model" in done.stderr
    assert sorted(job.iterdir()) == before


def test_groups_pins_and_a_file_size(tiny_folder: Path, tmp_path: Path) -> None:
    folder, packed = tmp_path / "run", tmp_path / "packed"
    limit = 98_000
    rules = ["--group", "q_proj,k_proj,v_proj", "--pin", "lm_head=int6-g64-asym"]
    done = run("search", tiny_folder, "--budget", f"file:{limit}B", "--out", folder, *SMALL, *rules)
    assert done.returncode == 0, done.stderr
    plan = Plan.load(folder / "plan.json")
    attention = "model.layers.0.self_attn."
    assert len({plan.assignments[f"{attention}{p}_proj"] for p in "qkv"}) == 1
    assert plan.assignments["model.embed_tokens"] == "int6-g64-asym"
    assert run("quantize", folder / "plan.json", "--out", packed, "--quiet").returncode == 0
    assert 0.8 * limit < (packed / "model.safetensors").stat().st_size <= limit


def test_an_interrupted_profile_leaves_nothing_and_says_so(
    tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = ["search", str(tiny_folder), "--out", str(tmp_path / "run"), "--sequences", "4000"]
    arguments += ["--rounding", "rtn"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitplan", *arguments, "--length", "16"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    while "units with" not in said:
        said += process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "the same command goes on from there" in said
    assert not [p for p in (tmp_path / "run").iterdir() if p.suffix == ".safetensors"]


GPT2 = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from bitplan import Workload

def make():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    ids = torch.randint(0, 96, (6, 4, 16))
    return Workload(GPT2LMHeadModel(config), calibration=list(ids[:4]), evaluation=list(ids[4:]))
"""

CNN = """
import torch
from torch import nn
from bitplan import Workload

def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2, groups=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )
    images = torch.randn(6, 16, 3, 16, 16)
    return Workload(model, calibration=list(images[:4]), evaluation=list(images[4:]))
"""


@pytest.mark.parametrize(("code", "units"), [(CNN, {"0", "3", "7"}), (GPT2, None)])
def test_any_module_through_a_python_function(
    tmp_path: Path, code: str, units: set[str] | None
) -> None:
    path = tmp_path / "net.py"
    path.write_text(code)
    folder = tmp_path / "run"
    done = run("search", f"{path}:make", "--budget", "5bpw", "--out", folder, "--quiet")
    assert done.returncode == 0, done.stderr
    plan = Plan.load(folder / "plan.json")
    assert plan.measured is not None and plan.measured.ppl is None
    if units is not None:
        assert set(plan.assignments) == units
    else:
        assert {"transformer.wpe", "transformer.h.0.attn.c_attn"} <= set(plan.assignments)
    packed = tmp_path / "packed"
    assert run("quantize", folder / "plan.json", "--out", packed, "--quiet").returncode == 0
    done = run("eval", packed, "--quiet")
    assert done.returncode == 0, done.stderr
    kl = float(done.stdout.split("measured KL")[1].split()[1])
    assert kl == pytest.approx(plan.measured.kl, rel=1e-3, abs=1e-6)

    path.write_text(code + "# changed\n")
    done = run("search", f"{path}:make", "--budget", "5bpw", "--out", folder, "--quiet")
    assert done.returncode == 1
    assert "other settings (definition_sha256" in " ".join(done.stderr.split())


def test_python_interface(tiny_folder: Path) -> None:
    model = load_model(str(tiny_folder), "cpu").module
    batches = [torch.randint(0, 512, (8, 32), generator=torch.Generator().manual_seed(0))]
    table = bitplan.profile(model, batches, formats=["int2-g32-asym", "int4-g32-asym"])
    plan = bitplan.solve(table, "3.5bpw")
    assert plan.bpw <= 3.5
    bitplan.apply(model, plan)
    with torch.no_grad():
        assert np.isfinite(model(batches[0]).logits.numpy()).all()


def test_a_plan_rounded_by_gptq_goes_all_the_way(tiny_folder: Path, tmp_path: Path) -> None:
    folder, packed, exported = (tmp_path / name for name in ("run", "packed", "exported"))
    searched = run(
        "search", tiny_folder, "--budget", "3.6bpw", "--out", folder, "--rounding", "gptq", *SMALL
    )
    assert searched.returncode == 0, searched.stderr
    assert Plan.load(folder / "plan.json").rounding == "gptq"
    assert any((folder / "renderings").rglob("*.safetensors"))
    steps = [
        ("quantize", folder / "plan.json", "--out", packed),
        ("eval", packed),
        ("export", folder, "--to", "compressed_tensors", "--snap", "--out", exported),
    ]
    for step in steps:
        done = run(*step)
        assert done.returncode == 0, done.stderr

"""The script that checks kernels on a GPU, tried where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
ROOT = Path(__file__).parents[2]
SECTIONS = (
    "compile",
    "correctness",
    "copy",
    "decode",
    "prefill",
    "model-1b",
    "model-8b",
    "profile",
    "refit",
    "sweep",
)


def run(out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    script = ROOT / "benchmarks" / "gpu_check.py"
    return subprocess.run(
        [sys.executable, str(script), "--tiny", "--out", str(out), "--seed", "1", *options],
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(out.parent / "triton")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_section_runs_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run(out, "--minutes", "30")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert tuple(found["sections"]) == SECTIONS
    for name, section in found["sections"].items():
        assert section["status"] == "done", (name, section)
    right = found["sections"]["correctness"]
    assert right["checks"] > 30 and not right["wrong"] and not right["skipped"]
    assert {row["m"] for row in found["sections"]["decode"]["rows"]} == {1}
    assert all(row["us"] > 0 for row in found["sections"]["prefill"]["rows"])
    assert (tmp_path / found["sections"]["refit"]["file"]).read_text().startswith("description")
    assert f"{right['checks']} checks, 0 wrong" in done.stdout  # the table at the end
    page = out.with_suffix(".md").read_text()
    assert "**0 wrong**" in page and "## Latency model" in page and "## Ways to launch" in page


def test_a_wrong_result_and_a_failing_section_are_told(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        "from bitplan.benchmarks import gpu_cases, gpu_check, gpu_timing\n"
        "gpu_cases.cases = lambda tiny, all=gpu_cases.cases: all(tiny)[:2]\n"
        "gpu_cases.expected = lambda *a, exact=gpu_cases.expected: exact(*a) * 1.05\n"
        "def fail(*_): raise OSError('no memory to copy')\n"
        "gpu_timing.copy_bandwidth = fail\n"
        f"sys.exit(gpu_check.main(['--tiny', '--out', {str(out)!r}, '--only', "
        "'correctness,copy,refit']))\n"
    )
    done = subprocess.run(
        [sys.executable, str(broken)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    sections = json.loads(out.read_text())["sections"]
    assert sections["correctness"]["status"] == "failed" and sections["correctness"]["wrong"] == 2
    assert sections["copy"]["status"] == "failed"
    assert "no memory to copy" in sections["copy"]["traceback"]
    assert sections["refit"]["status"] == "done"
    page = out.with_suffix(".md").read_text()
    assert "**2 wrong**" in page and page.count("- Wrong: `") == 2
    assert "| copy | failed |" in page and "## Copy" not in page

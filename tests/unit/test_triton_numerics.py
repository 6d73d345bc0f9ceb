"""Runs what is in ``interpreted`` where Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
FOLDER = Path(__file__).parents[1] / "interpreted"


@pytest.mark.parametrize(
    "interpret", ["1", pytest.param("0", marks=pytest.mark.gpu)], ids=["interpreted", "on a GPU"]
)
@pytest.mark.parametrize("cases", ["plane_kernels.py", "plane_parts.py"])
def test_kernels_agree_with_torch(cases: str, interpret: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / cases)],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

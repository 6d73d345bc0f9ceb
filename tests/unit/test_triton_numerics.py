"""Runs ``interpreted/plane_kernels.py`` where Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
CASES = Path(__file__).parents[1] / "interpreted" / "plane_kernels.py"


@pytest.mark.parametrize(
    "interpret", ["1", pytest.param("0", marks=pytest.mark.gpu)], ids=["interpreted", "on a GPU"]
)
def test_kernels_agree_with_torch(interpret: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

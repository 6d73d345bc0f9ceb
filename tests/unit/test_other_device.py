"""The main job with the model on another device than the CPU, as ``--device cuda`` has it.

The device is pretended: see :mod:`bitplan.tests.pretended_device`.  The job runs in a process of
its own, as torch keeps a device that was made known to it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """
import json, sys
from pathlib import Path
import torch
from bitplan.tests.pretended_device import Pretended, register
register()
from bitplan._base.progress import Reporter
from bitplan.jobs.held_out import run_eval
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
model, out, device, rounding = sys.argv[1:]
profile = ProfileSettings(
    model, formats=("int2-g32-asym", "int4-g32-asym", "nf4-g64", "int8-gc"), rounding=rounding,
    calibration="prose", sequences=8, rounding_sequences=8, length=32, device=device,
    batch_tokens=64,
)
search = SearchSettings(
    budget="3.6bpw", eval_tokens=256, eval_also="none", tune=2, refine=1, guard=8, bootstrap=0
)
quiet = Reporter(quiet=True)
plan = run_search(profile, search, Path(out), quiet)
again = run_eval(Path(out), "builtin", 256, device, quiet)[1]
print(json.dumps({
    "predicted": plan.predicted_kl, "kl": plan.measured.kl, "again": again.mean_kl,
    "operations": sum(Pretended.asked.values()),
    "awaited": Pretended.awaited["_local_scalar_dense"],
}))
"""

REFUSED = """
import torch
from bitplan.tests.pretended_device import register
device = register()
there, here = torch.ones(3, device=device), torch.ones(3)
for forbidden in (
    lambda: there + here,
    lambda: there.numpy(),
    lambda: torch.bucketize(there, here),
    lambda: here[there.long()],
    lambda: torch.rand(3, device=device, generator=torch.Generator()),
):
    try:
        forbidden()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("nothing was raised")
assert torch.equal((there[here.long()] * torch.tensor(2.0)).cpu(), 2 * here)
weight = torch.nn.Linear(3, 2).to(device).weight
(weight @ there).square().sum().backward()
assert weight.grad.device == device
"""


def _run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    _run(REFUSED)


@pytest.mark.parametrize("rounding", ["fisher_gptq", "rtn"])
def test_a_job_on_another_device_gives_what_it_gives_on_the_cpu(
    wide_folder: Path, tmp_path: Path, rounding: str
) -> None:
    """Load, statistics, rounding, prices, refinement, tuning, validation and evaluation."""
    found = {}
    for device in ("cpu", "pretended"):
        out = _run(JOB, str(wide_folder), str(tmp_path / device), device, rounding)
        found[device] = json.loads(out.splitlines()[-1])
    there, here = found["pretended"], found["cpu"]
    assert there["operations"] > 10_000 and here["operations"] == 0
    assert there["awaited"] < there["operations"] / 20  # no loop that waits for every number
    for figure in ("predicted", "kl", "again"):
        assert there[figure] == pytest.approx(here[figure], rel=0.02)
    assert there["again"] == pytest.approx(there["kl"], rel=1e-3)

"""Two workers on one PostgreSQL study, one of them killed in the middle of a trial."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState

from bitplan.search.blackbox.study import job_of, open_study, publish
from bitplan.search.oracle import Oracle
from bitplan.testing.problems import synthetic_problem

pytestmark = pytest.mark.slow
TRIALS = 14
SEQUENCES, LENGTH = 2, 4
WORKER = """
import sys, time
import numpy as np
from bitplan.search.blackbox import storage
from bitplan.search.oracle import Oracle
from bitplan.search.blackbox.study import problem_from_job, read_job, work

storage.HEARTBEAT, storage.GRACE = 1, 2  # seconds
url = sys.argv[1]
problem = problem_from_job(read_job(url))
rows = np.arange(len(problem.units))

def measure(choices, sequences):
    print("measuring", flush=True)
    time.sleep(0.6)
    kl = problem.loss[rows, np.array(choices)].sum(axis=1)
    return np.repeat(kl[:, None], len(sequences), axis=1)

print("done", work(url, None, Oracle(measure, 2, 4, max_tokens=0)), flush=True)
"""


def binary(name: str) -> str | None:
    """A server program, which Debian keeps out of the PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(versions[-1]) if versions else None)


@pytest.fixture
def server() -> Iterator[str]:
    """URL of a private server on a free port of the loopback device."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'bitplan[postgresql]'")
    initdb, pg_ctl = binary("initdb"), binary("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("needs a PostgreSQL server (apt-get install postgresql): no initdb and pg_ctl")
    user = None
    folder = Path(tempfile.mkdtemp(prefix="bitplan-postgres-"))
    if os.getuid() == 0:  # the server refuses to run as root
        user = "postgres"
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        # To a file: the server keeps what it inherits open, so a pipe would never end.
        with (folder / "commands.log").open("ab") as log:
            subprocess.run(command, user=user, cwd=folder, stdout=log, stderr=log, check=True)

    data = str(folder / "data")
    options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"
    try:
        run(initdb, "-D", data, "-U", "bitplan", "--auth=trust", "--no-sync")
        run(pg_ctl, "-D", data, "-w", "-l", str(folder / "server.log"), "-o", options, "start")
        try:
            yield f"postgresql://bitplan@127.0.0.1:{port}/postgres"
        finally:
            run(pg_ctl, "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def start_worker(storage: str, output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen([sys.executable, "-c", WORKER, storage], stdout=file)


def begun(output: Path) -> int:
    return output.read_text().count("measuring")


def wait_for(output: Path, count: int) -> None:
    """Wait until a worker has begun its ``count``-th trial."""
    limit = time.monotonic() + 30
    while begun(output) < count:
        assert time.monotonic() < limit, output.read_text()
        time.sleep(0.05)


def test_a_killed_worker_loses_nothing(server: str, tmp_path: Path) -> None:
    def unused(*_: object) -> np.ndarray:
        raise AssertionError("only the workers measure")

    problem = replace(
        synthetic_problem(24, 6, seed=0),
        kinds=("q", "o", "up", "down") * 6,
        layers=tuple(unit // 4 for unit in range(24)),
    )
    oracle = Oracle(unused, SEQUENCES, LENGTH, max_tokens=TRIALS * SEQUENCES * LENGTH)
    max_bytes = int(3.4 * problem.weights / 8)
    study = open_study(server, "job", "tpe")
    publish(study, job_of(replace(problem, oracle=oracle), max_bytes, "tpe", seed=0))

    outputs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    first, second = (start_worker(server, output) for output in outputs)
    try:
        wait_for(outputs[1], 2)
        wait_for(outputs[0], max(3, begun(outputs[0]) + 1))  # so that it has just begun one
        time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert second.wait(timeout=60) == 0
    finally:
        first.kill()
        second.kill()

    trials = study.get_trials()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    done = {pid: sum(ran_by(trial) == pid for trial in complete) for pid in (first.pid, second.pid)}
    assert len(complete) == TRIALS == sum(done.values())
    assert done[first.pid] >= 2
    assert f"done {done[second.pid]}" in outputs[1].read_text()

    lost = [trial for trial in trials if ran_by(trial) == first.pid and trial not in complete]
    assert [trial.state for trial in lost] == [TrialState.FAIL]
    again = [t for t in complete if t.system_attrs.get("failed_trial") == lost[0].number]
    assert [trial.params for trial in again] == [lost[0].params]
    assert ran_by(again[0]) == second.pid
    assert len({tuple(trial.params.values()) for trial in complete}) == TRIALS


def ran_by(trial: FrozenTrial) -> int:
    return int(trial.user_attrs["worker"].rpartition(":")[2])

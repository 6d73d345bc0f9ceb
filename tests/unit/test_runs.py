"""A run folder as a job: killed and resumed, locked, listed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bitplan._base import records
from bitplan._base.files import write_json
from bitplan._base.progress import Reporter
from bitplan.jobs import job as jobs
from bitplan.jobs.job import Job, read_log
from bitplan.jobs.listing import list_jobs
from bitplan.jobs.lock import RunLock, is_running
from bitplan.jobs.record import JobRecord
from bitplan.search.plan import Plan

from ..fakes import fake_run, flat_units

ARGV = ["bitplan", "search", "my model", "--budget", "4bpw"]
TEXT = "bitplan search 'my model' --budget 4bpw"
SETTINGS: dict[str, Any] = {"model": "my model", "formats": ["int4-g64", "int8-gc"]}

FAKE_JOB = """
import sys, time
from pathlib import Path
from bitplan.jobs.job import Job

folder, stop = Path(sys.argv[1]), sys.argv[2]

def point(name):
    if name == stop:
        print(name, flush=True)
        time.sleep(60)

with Job(folder, ["bitplan", "search"], {"budget": "4bpw"}) as job:
    point("start")
    for name in ("profile", "solve", "validate"):
        with job.stage(name) as stage:
            if stage.finished:
                continue
            job.on_progress("Working", 0, 4)
            time.sleep(0.05)
            point(f"in {name}")
            with (folder / name).open("a") as made:
                made.write("x")
            point(f"made {name}")
        point(f"after {name}")
    if stop == "busy":
        print("busy", flush=True)
        while True:
            with job.stage("busy"):
                job.log("step", note="x" * 1000)
"""


def start(folder: Path, stop: str) -> subprocess.Popen[str]:
    """Start the fake job and wait until it is at the point ``stop``."""
    process = subprocess.Popen(
        [sys.executable, "-c", FAKE_JOB, str(folder), stop], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline().strip() == stop
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def made(folder: Path) -> dict[str, int]:
    """How often each stage was really executed."""
    names = ("profile", "solve", "validate")
    return {n: len((folder / n).read_text()) for n in names if (folder / n).exists()}


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
@pytest.mark.parametrize(
    ("point", "before", "solved"),
    [
        ("start", {}, 1),
        ("in solve", {"profile": 1}, 1),
        ("made solve", {"profile": 1, "solve": 1}, 2),  # killed before it was marked done
        ("after solve", {"profile": 1, "solve": 1}, 1),
    ],
)
def test_a_killed_job_goes_on_without_repeating_finished_stages(
    tmp_path: Path, point: str, before: dict[str, int], solved: int
) -> None:
    process = start(tmp_path, point)
    assert list_jobs(tmp_path)[0].status == "running"
    kill(process)
    assert made(tmp_path) == before
    assert JobRecord.load(tmp_path).status == "running"  # nobody was left to change it
    assert list_jobs(tmp_path)[0].status == "interrupted"
    started = JobRecord.load(tmp_path).started

    subprocess.run([sys.executable, "-c", FAKE_JOB, str(tmp_path), "never"], check=True)
    assert made(tmp_path) == {"profile": 1, "solve": solved, "validate": 1}
    record = JobRecord.load(tmp_path)
    assert (record.status, record.started) == ("done", started)
    assert [(s.name, s.status) for s in record.stages] == [
        ("profile", "done"),
        ("solve", "done"),
        ("validate", "done"),
    ]
    assert all(stage.seconds >= 0.05 for stage in record.stages)


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_kill_while_writing_leaves_whole_files(tmp_path: Path) -> None:
    process = start(tmp_path, "busy")
    while len(read_log(tmp_path)) < 200:
        time.sleep(0.01)
    kill(process)
    record = JobRecord.load(tmp_path)
    assert [stage.name for stage in record.stages] == ["profile", "solve", "validate", "busy"]
    with Job(tmp_path, ["bitplan", "search"], {"budget": "4bpw"}):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {"job.json", "job.log", "job.lock", "profile", "solve", "validate"}


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    process = start(tmp_path, "in profile")
    before = (tmp_path / "job.json").read_bytes()
    with pytest.raises(ValueError) as refusal, Job(tmp_path, ARGV, SETTINGS):
        pass
    message = str(refusal.value)
    assert re.search(rf"{re.escape(str(tmp_path))} is in use by process {process.pid}", message)
    assert re.search(r"`bitplan search` there since \d{4}-\d\d-\d\dT\S+Z \(0:\d\d\)", message)
    assert f"`kill {process.pid}`" in message and "--out" in message
    assert (tmp_path / "job.json").read_bytes() == before
    kill(process)
    with Job(tmp_path, ARGV, SETTINGS):
        assert list_jobs(tmp_path)[0].status == "running"


def test_the_lock_says_who_without_the_host(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new" / "run", TEXT):
        holder = json.loads((tmp_path / "new" / "run" / "job.lock").read_text())
        assert holder.keys() == {"pid", "since", "command"}
        assert (holder["pid"], holder["command"]) == (os.getpid(), TEXT)
        with pytest.raises(ValueError, match="is in use"), RunLock(tmp_path / "new" / "run", "x"):
            pass
    with RunLock(tmp_path / "new" / "run", "a shorter one"):
        text = (tmp_path / "new" / "run" / "job.lock").read_text()
        assert json.loads(text)["command"] == "a shorter one"


def test_the_lock_is_polite_when_it_cannot_say_who(tmp_path: Path) -> None:
    with RunLock(tmp_path, TEXT):
        (tmp_path / "job.lock").write_bytes(b"")
        with pytest.raises(ValueError, match="in use by another process"), RunLock(tmp_path, TEXT):
            pass


def test_listing_jobs_does_not_keep_one_from_starting(tmp_path: Path) -> None:
    with RunLock(tmp_path, TEXT):
        pass
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_running(tmp_path)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            with RunLock(tmp_path, TEXT):
                assert is_running(tmp_path)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("error", "status", "level"),
    [(ValueError("no"), "failed", "error"), (KeyboardInterrupt(), "interrupted", "warning")],
)
def test_exceptions_are_marked_and_pass(
    tmp_path: Path, error: BaseException, status: str, level: str
) -> None:
    with pytest.raises(type(error)), Job(tmp_path, ARGV, SETTINGS) as job, job.stage("solve"):
        raise error
    record = JobRecord.load(tmp_path)
    assert (record.status, record.stages[0].status) == (status, status)
    assert not is_running(tmp_path)
    *_, stage, run = read_log(tmp_path)
    assert (stage["event"], stage["level"]) == (f"stage {status}", level)
    assert run["event"] == f"run {status}"
    assert run["fields"]["error"] == (
        "ValueError: no" if status == "failed" else "KeyboardInterrupt"
    )


def test_seconds_add_up_over_runs_and_other_settings_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), Job(tmp_path, ARGV, SETTINGS) as job:
        with job.stage("profile"):
            now += 100
        with job.stage("solve"):
            now += 7
            raise KeyboardInterrupt
    with Job(tmp_path, ARGV, SETTINGS | {"formats": ("int4-g64", "int8-gc")}) as job:  # as a tuple
        with job.stage("profile") as stage:
            assert stage.finished
        with job.stage("solve") as stage:
            assert not stage.finished
            now += 5
    stages = JobRecord.load(tmp_path).stages
    assert [(s.name, s.seconds) for s in stages] == [("profile", 100), ("solve", 12)]
    assert list_jobs(tmp_path)[0].seconds == 112
    with Job(tmp_path, ARGV, SETTINGS | {"budget": "3bpw"}):
        pass
    assert JobRecord.load(tmp_path).stages == []
    assert JobRecord.load(tmp_path).settings == SETTINGS | {"budget": "3bpw"}


@pytest.mark.parametrize("error", [ValueError("too small\nfor it"), KeyboardInterrupt()])
@pytest.mark.parametrize("settings", [SETTINGS, SETTINGS | {"budget": "0.1bpw"}])
def test_a_refused_attempt_leaves_a_finished_job_as_it_was(
    tmp_path: Path, error: BaseException, settings: dict[str, Any]
) -> None:
    with Job(tmp_path, ARGV, SETTINGS) as job, job.stage("profile"):
        pass
    before = (tmp_path / "job.json").read_bytes()
    for stage in ("profile", "solve"):  # the finished profile is found, then there is no plan
        with pytest.raises(type(error)), Job(tmp_path, ["x"], settings) as job:
            if stage == "solve":
                with job.stage("profile"):
                    pass
            with job.stage(stage):
                raise error
        assert (tmp_path / "job.json").read_bytes() == before
    assert read_log(tmp_path)[-1]["event"] in ("run failed", "run interrupted")
    assert list_jobs(tmp_path)[0].status == "done"


def test_an_attempt_that_computed_something_replaces_a_finished_job(tmp_path: Path) -> None:
    with Job(tmp_path, ARGV, SETTINGS):
        pass
    other = Job(tmp_path, ["x"], {"budget": "2bpw"})
    with pytest.raises(ValueError), other as job, job.stage("validate"):
        job.on_progress("Validating", 0, 3)
        assert JobRecord.load(tmp_path).settings == {"budget": "2bpw"}
        raise ValueError("too small\nfor it")
    info = list_jobs(tmp_path)[0]
    assert (info.status, info.error) == ("failed", "too small")


def test_a_finished_stage_that_works_again_is_running_again(tmp_path: Path) -> None:
    for _ in range(2):  # its file was deleted in between
        with Job(tmp_path, ARGV, SETTINGS) as job, job.stage("profile") as stage:
            job.on_progress("Profiling", 0, 3)
            assert stage.status == "running"
    assert JobRecord.load(tmp_path).stages[0].status == "done"


def test_bars_reach_the_job_file_once_a_second_and_give_an_eta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, writes = 0.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    write = write_json

    def counted(path: Path, data: Any) -> None:
        nonlocal writes
        writes += 1
        write(path, data)

    with Job(tmp_path, ARGV, SETTINGS) as job, job.stage("profile"):
        reporter = Reporter(quiet=True, listener=job)
        reporter.say("96 sequences")
        monkeypatch.setattr(records, "write_json", counted)
        now += 50
        with reporter.bar("Profiling", 400) as advance:
            for _ in range(100):
                now += 0.1
                advance(1)
            info = list_jobs(tmp_path)[0]
            assert (info.stage, info.doing, info.total) == ("profile", "Profiling", 400)
            assert 90 <= info.done <= 100  # 10 steps a second, at most a second old
            assert info.eta == pytest.approx(0.1 * (400 - info.done), abs=2.5)  # at most 1-2 s ago
            assert writes <= 12
    assert [e["fields"]["text"] for e in read_log(tmp_path) if e["event"] == "message"] == [
        "96 sequences"
    ]
    info = list_jobs(tmp_path)[0]
    assert (info.status, info.done, info.eta) == ("done", 100, None)
    assert info.seconds == pytest.approx(60.0)


def test_a_full_disk_does_not_stop_a_run_at_a_progress_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(jobs, "WRITE_INTERVAL", 0.0)
    with Job(tmp_path, ARGV, SETTINGS) as job, job.stage("profile"):
        with monkeypatch.context() as patch:
            patch.setattr(records, "write_json", full)
            job.on_progress("Profiling", 0, 3)
        job.on_progress("Profiling", 1, 3)
    assert JobRecord.load(tmp_path).stages[0].done == 1


def test_the_log_survives_a_line_cut_off(tmp_path: Path) -> None:
    with Job(tmp_path, ARGV, SETTINGS) as job:
        job.log("step accepted", step=1, kl=0.5, where=Path("x"))
    whole = read_log(tmp_path)
    with (tmp_path / "job.log").open("ab") as file:
        file.write('{"time": "2026-01-01T00:00:00Z", "level": "in… é'.encode()[:-1])
    assert read_log(tmp_path) == whole
    with Job(tmp_path, ARGV, SETTINGS) as job:
        pass
    entries = read_log(tmp_path)
    assert [entry["event"] for entry in entries] == [
        "run started",
        "step accepted",
        "run finished",
        "run started",
        "run finished",
    ]
    assert entries[1]["fields"] == {"step": 1, "kl": 0.5, "where": "x"}
    assert entries[1].keys() == {"time", "level", "event", "fields"}


def test_jobs_are_listed_latest_first_with_their_plans(tmp_path: Path) -> None:
    for name, updated in (("old", "2026-01-01T00:00:00Z"), ("deep/new", "2026-01-02T00:00:00Z")):
        with Job(tmp_path / name, ARGV, SETTINGS):
            pass
        path = tmp_path / name / "job.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"updated": updated}))
    fake_run(tmp_path / "old", flat_units())
    fake_run(tmp_path / "no job", flat_units())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "job.json").write_text("[1, 2]")
    new, old = list_jobs(tmp_path)
    assert [new.folder, old.folder] == [tmp_path / "deep" / "new", tmp_path / "old"]
    assert (new.command, new.status, new.stage, new.budget) == (TEXT, "done", None, None)
    plan = Plan.load(tmp_path / "old" / "plan.json")
    assert plan.measured
    assert (old.budget, old.bpw, old.kl) == ("4.3bpw", plan.bpw, plan.measured.kl)


def test_a_plan_of_an_earlier_job_or_a_damaged_one_is_not_shown(tmp_path: Path) -> None:
    fake_run(tmp_path, flat_units())
    path = tmp_path / "plan.json"
    plan = json.loads(path.read_text())
    with Job(tmp_path, ARGV, SETTINGS):
        path.write_text(json.dumps(plan | {"created": "2020-01-01T00:00:00Z"}))
        assert list_jobs(tmp_path)[0].bpw is None
        path.write_text("{")
        assert list_jobs(tmp_path)[0].bpw is None


def test_settings_of_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no job in .*`bitplan jobs`"):
        JobRecord.load(tmp_path)
    with Job(tmp_path, ARGV, SETTINGS):
        pass
    assert JobRecord.load(tmp_path).settings == SETTINGS
    path = tmp_path / "job.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"schema": 2}))
    with pytest.raises(ValueError, match=r"job.json is not a valid job: schema"):
        JobRecord.load(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a JSON text file"):
        JobRecord.load(tmp_path)

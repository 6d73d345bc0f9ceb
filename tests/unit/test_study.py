"""Studies shared by workers: groups, resuming, lost trials, published jobs, clear errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.trial import TrialState

from bitplan.search.blackbox import study as studies
from bitplan.search.blackbox.storage import open_storage
from bitplan.search.blackbox.trials import run_trials
from bitplan.search.levels import MAX_GROUPS, Groups
from bitplan.search.oracle import Choice, Oracle
from bitplan.search.problem import Problem
from bitplan.search.solvers import SOLVERS
from bitplan.testing.problems import synthetic_problem

SEQUENCES, LENGTH = 2, 4
EACH = SEQUENCES * LENGTH  # tokens per trial
NAMES = ("tpe", "nsga2")
KINDS = ("q", "up")


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Nine layers of two kinds; one unit is pinned, one must not take the smallest format."""
    table = synthetic_problem(27, 5, seed=6)
    loss = table.loss.copy()
    loss[4, :3] = loss[4, 4:] = np.inf
    loss[8, 0] = np.inf
    return replace(
        table,
        loss=loss,
        kinds=tuple(KINDS[u % 2] for u in range(27)),
        layers=tuple(u // 3 for u in range(27)),
    )


class Model:
    """The table's loss as measured KL; counts, and dies after ``limit`` measurements."""

    def __init__(self, problem: Problem, limit: float = np.inf) -> None:
        self.loss = problem.loss
        self.limit = limit
        self.seen: list[bytes] = []

    def __call__(self, choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        if len(self.seen) >= self.limit:
            raise KeyboardInterrupt
        self.seen += [choice.tobytes() for choice in choices]
        kl = self.loss[np.arange(len(self.loss)), np.array(choices)].sum(axis=1)
        return np.repeat(kl[:, None], len(sequences), axis=1)


def oracle(model: Model, trials: int, storage: str | None = None) -> Oracle:
    tokens = trials * EACH + EACH - 1
    return Oracle(model, SEQUENCES, LENGTH, max_tokens=tokens, storage=storage, study="job")


def budget(problem: Problem) -> int:
    return int(3.6 * problem.weights / 8)


def trials_of(storage: str, name: str = "job") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=open_storage(storage)).get_trials()


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/new/job.sqlite"


# Groups


def test_groups_are_kinds_by_thirds_of_the_depth(problem: Problem) -> None:
    groups = Groups.build(problem)
    assert sorted(groups.names) == sorted(f"{k} {b}" for k in KINDS for b in ("0-2", "3-5", "6-8"))
    head = replace(problem, layers=(None, *problem.layers[1:]))
    assert Groups.build(head).names[0] == "q"
    assert len(Groups.build(synthetic_problem(500, 3, seed=0)).names) == MAX_GROUPS


def test_fitted_plans_fill_the_bytes(problem: Problem) -> None:
    groups = Groups.build(problem)
    ladder = groups.ladder
    random = np.random.default_rng(0)
    least, most = ladder.size(np.zeros_like(ladder.top)), ladder.size(ladder.top)
    for _ in range(50):
        preferences = dict(zip(groups.names, random.uniform(-1, 1, 6).tolist(), strict=True))
        limit = int(random.integers(least, most))
        choice = groups.fit(preferences, limit, seed=1)
        assert problem.allowed[np.arange(27), choice].all()
        level = ladder.level(choice)
        slack = limit - ladder.size(level)
        open_ = np.flatnonzero(level < ladder.top)
        assert slack >= 0
        assert (
            ladder.bytes[open_, level[open_] + 1] - ladder.bytes[open_, level[open_]] > slack
        ).all()


def test_every_allocation_by_group_can_be_reached() -> None:
    table = synthetic_problem(12, 4, seed=2)
    problem = replace(
        table, kinds=tuple("ab"[u % 2] for u in range(12)), layers=tuple(u // 2 for u in range(12))
    )
    groups = Groups.build(problem)
    random = np.random.default_rng(3)
    order = problem.bytes.sum(axis=0).argsort()
    for _ in range(20):
        place = random.integers(0, 4, len(groups.names))
        ahead = (place - 1.5) / 3
        preferences = np.sign(ahead) * np.abs(ahead) ** (1 / 5)
        wanted = order[place[groups.group]]
        limit = problem.evaluate(wanted, np.inf).bytes
        named = dict(zip(groups.names, preferences.tolist(), strict=True))
        assert (groups.fit(named, limit, seed=0) == wanted).all()


# Solvers


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_search_fits_repeats_and_beats_its_first_plan(
    problem: Problem, name: str
) -> None:
    max_bytes = budget(problem)
    solve = SOLVERS.get(name)
    model = Model(problem)
    first, second = (
        solve(replace(problem, oracle=oracle(m, 60)), max_bytes, seed=3)
        for m in (model, Model(problem))
    )
    assert (first.choice == second.choice).all()
    assert first.bytes <= max_bytes
    even = Groups.build(problem)
    start = problem.evaluate(even.fit(dict.fromkeys(even.names, 0.0), max_bytes, 3), np.inf)
    assert first.loss <= start.loss * (1 if name == "nsga2" else 0.97)
    assert len(model.seen) * EACH <= 60 * EACH


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_search_does_only_the_missing_trials(
    problem: Problem, name: str, storage: str
) -> None:
    def run(model: Model, trials: int, where: str | None = storage) -> Choice:
        asked = replace(problem, oracle=oracle(model, trials, where))
        return SOLVERS.get(name)(asked, budget(problem), seed=1).choice

    whole, dying, rest = Model(problem), Model(problem, limit=15), Model(problem)
    expected = run(whole, 24, where=None)
    with pytest.raises(KeyboardInterrupt):
        run(dying, 24)
    assert len(dying.seen) == 15
    assert (run(rest, 24) == expected).all()
    assert list(dict.fromkeys(dying.seen + rest.seen)) == list(dict.fromkeys(whole.seen))
    assert len(rest.seen) <= 9
    run(Model(problem, limit=0), 24)
    run(rest, 25)
    assert sum(t.state == TrialState.COMPLETE for t in trials_of(storage)) == 25


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_of_a_dead_process_is_run_again_at_once(problem: Problem, storage: str) -> None:
    max_bytes, solve = budget(problem), SOLVERS.get("tpe")
    solve(replace(problem, oracle=oracle(Model(problem), 3, storage)), max_bytes)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    study = optuna.load_study(study_name="job", storage=open_storage(storage))
    trial = study.ask()
    lost = {name: trial.suggest_float(name, -1, 1) for name in Groups.build(problem).names}
    trial.set_user_attr("worker", f"{socket.gethostname()}:{dead.pid}")

    solve(replace(problem, oracle=oracle(Model(problem), 4, storage)), max_bytes)
    trials = trials_of(storage)
    states = [t.state for t in trials]
    assert states == [*[TrialState.COMPLETE] * 3, TrialState.FAIL, TrialState.COMPLETE]
    assert trials[4].params == lost
    assert trials[4].user_attrs["worker"] == f"{socket.gethostname()}:{os.getpid()}"


def test_a_trial_too_many_is_not_run() -> None:
    """Another worker asks while this one's objective runs; then this one asks in vain."""
    study = optuna.create_study()
    ran = []

    def objective(trial: optuna.Trial) -> float:
        ran.append(trial.number)
        if trial.number == 0:
            other = study.ask()  # another worker's, the second and last planned
            run_trials_of_third_worker()
            study.tell(other, 1.0)
        return 0.0

    def run_trials_of_third_worker() -> None:
        from bitplan.search.blackbox.trials import _run_one

        study._thread_local.in_optimize_loop = False  # as in a process of its own
        _run_one(study, objective, trials=2)

    run_trials(study, objective, 2)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert ran == [0]


def test_a_result_of_a_worker_taken_for_dead_is_dropped() -> None:
    study = optuna.create_study()
    ran = []

    def objective(trial: optuna.Trial) -> float:
        ran.append(trial.number)
        if trial.number == 0:
            study.tell(trial.number, state=TrialState.FAIL)  # by another worker
        return float(trial.number)

    run_trials(study, objective, 1)
    assert ran == [0, 1]
    assert study.best_value == 1.0


def test_a_study_of_another_problem_is_refused(problem: Problem, storage: str) -> None:
    def solve(name: str, max_bytes: int, seed: int = 0, scale: float = 1.0) -> None:
        asked = oracle(Model(problem), 2, storage)
        profile = replace(problem, loss=scale * problem.loss, oracle=asked)
        SOLVERS.get(name)(profile, max_bytes, seed=seed)

    solve("tpe", budget(problem))
    with pytest.raises(ValueError, match="another profile, budget, seed"):
        solve("tpe", budget(problem) - 1)
    with pytest.raises(ValueError, match="another profile, budget, seed"):
        solve("tpe", budget(problem), seed=1)
    with pytest.raises(ValueError, match="another profile, budget, seed"):
        solve("tpe", budget(problem), scale=1.01)
    with pytest.raises(ValueError, match=r"has 1 objectives, and 'nsga2' needs 2 \(bytes, kl\)"):
        solve("nsga2", budget(problem))


def test_too_few_tokens_for_one_trial_are_refused(problem: Problem) -> None:
    asked = Oracle(Model(problem), SEQUENCES, LENGTH, max_tokens=EACH - 1)
    with pytest.raises(ValueError, match=r"7 tokens do not pay for .* measures 8 tokens"):
        SOLVERS.get("tpe")(replace(problem, oracle=asked), budget(problem))


# Jobs for other workers


def published(problem: Problem, storage: str, trials: int, solver: str = "tpe") -> dict[str, Any]:
    asked = replace(problem, oracle=oracle(Model(problem), trials, storage))
    job = studies.job_of(asked, budget(problem), solver, seed=5) | {"model": {"id": "tiny"}}
    studies.publish(studies.open_study(storage, "job", solver), job)
    return job


def test_a_published_job_is_read_back(problem: Problem, storage: str) -> None:
    job = published(problem, storage, 3)
    json.dumps(job, allow_nan=False)
    read = studies.read_job(storage)
    assert read == job | {"study": "job"}
    again = studies.problem_from_job(read)
    for name in ("units", "formats", "kinds", "layers", "weights"):
        assert getattr(again, name) == getattr(problem, name)
    assert (again.bytes == problem.bytes).all()
    assert (again.loss == problem.loss).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_does_what_is_missing(problem: Problem, storage: str, name: str) -> None:
    published(problem, storage, 6, name)
    worker = Oracle(Model(problem), SEQUENCES, LENGTH, max_tokens=0)
    assert studies.work(storage, None, worker) == 6
    assert studies.work(storage, "job", worker) == 0
    asked = replace(problem, oracle=oracle(Model(problem, limit=0), 6, storage))
    solution = SOLVERS.get(name)(asked, budget(problem), seed=5)
    values = [t.values[-1] for t in trials_of(storage) if t.values]
    assert len(values) == 6
    if name == "tpe":
        assert solution.loss == pytest.approx(min(values))


def test_a_worker_with_other_sequences_is_refused(problem: Problem, storage: str) -> None:
    asked = replace(problem, oracle=oracle(Model(problem), 2, storage))
    SOLVERS.get("tpe")(asked, budget(problem), seed=5)
    published(problem, storage, 3)
    other = Oracle(Model(problem), SEQUENCES + 1, LENGTH, max_tokens=0)
    with pytest.raises(ValueError, match="set of sequences"):
        studies.work(storage, None, other)


def test_broken_jobs_name_what_is_wrong(problem: Problem, storage: str) -> None:
    job = published(problem, storage, 3)
    without = {key: value for key, value in job.items() if key != "bytes"}
    with pytest.raises(ValueError, match="bytes: Field required"):
        studies.problem_from_job(without)
    with pytest.raises(ValueError, match=r"Expected bytes and loss of shape \(1, 5\)"):
        studies.problem_from_job(job | {"units": ["u"]})
    with pytest.raises(ValueError, match=r"weights: .*integer"):
        studies.problem_from_job(job | {"weights": "many"})
    with pytest.raises(ValueError, match="without an oracle"):
        studies.job_of(problem, 1, "tpe", seed=0)
    with pytest.raises(ValueError, match="Only nsga2 and tpe keep an Optuna study"):
        studies.open_study(None, "job", "certified")


def test_missing_studies_are_listed(problem: Problem, storage: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no file"):
        studies.read_job(storage)
    studies.open_study(storage, "first", "tpe")
    with pytest.raises(ValueError, match=r"0 studies with a job.*'first'.*Start the search"):
        studies.read_job(storage)
    with pytest.raises(ValueError, match=r"Study 'first' in .* has no job"):
        studies.read_job(storage, "first")
    published(problem, storage, 3)
    with pytest.raises(ValueError, match=r"no study 'jab'\. Studies there: 'first', 'job'"):
        studies.read_job(storage, "jab")


def test_storage_errors_say_what_to_do_and_hide_the_password() -> None:
    with pytest.raises(ValueError, match="'host' is not a storage URL"):
        open_storage("me:secret@host")
    with pytest.raises(ValueError, match=r"pip install 'bitplan\[postgresql\]'") as missing:
        open_storage("mysql+mysqldb://me:secret@host/db")
    with pytest.raises(ValueError, match=r"cannot be opened: .* Check that the server") as closed:
        open_storage("postgresql://me:secret@127.0.0.1:9/db")
    for error in (missing, closed):
        assert "secret" not in str(error.value)

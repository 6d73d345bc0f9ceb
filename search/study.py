"""Optuna studies that several processes or machines work on, and survive any of them."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BaseModel, ValidationError
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from .oracle import Oracle
from .problem import Problem
from .solvers import SOLVERS

OBJECTIVES = {"tpe": ("kl",), "nsga2": ("bytes", "kl")}  # per solver, all minimized
TABLE_TRIALS = 20  # without an oracle
HEARTBEAT = 10  # seconds between two signs of life of a worker
GRACE = 30  # seconds without one until its trial is given to another worker
MAX_RETRIES = 3  # of one trial: one that kills every worker is given up
POLL = 1.0  # seconds between two looks at a study in which others hold the last trials

Objective = Callable[[Trial], float | tuple[float, float]]


class _Surplus(Exception):
    """This trial is more than the study needs: another worker asked at the same time."""


def open_study(storage: str | None, name: str, solver: str) -> Study:
    """Open the study of a search, or begin it.

    Args:
        storage: URL such as ``sqlite:///job.sqlite`` (one machine) or
            ``postgresql://user:password@host/database``; None keeps the study in memory.
        name: Name of the study.
        solver: ``tpe`` or ``nsga2``, which decides the objectives.

    Raises:
        ValueError: If the storage cannot be opened, or the study has other objectives.
    """
    if solver not in OBJECTIVES:
        raise ValueError(
            f"Only {' and '.join(OBJECTIVES)} keep an Optuna study; {solver!r} does not."
        )
    goals = OBJECTIVES[solver]
    with _quiet():
        study = optuna.create_study(
            storage=None if storage is None else _open_storage(storage),
            study_name=name,
            directions=["minimize"] * len(goals),
            load_if_exists=True,
        )
        if len(study.directions) != len(goals):
            raise ValueError(
                f"Study {name!r} has {len(study.directions)} objectives, and {solver!r} needs "
                f"{len(goals)} ({', '.join(goals)}): another solver began it. Choose another name."
            )
        study.set_metric_names(list(goals))
    return study


def search(
    problem: Problem,
    max_bytes: int,
    seed: int,
    solver: str,
    objective: Objective,
    sampler: Callable[[int], BaseSampler],
    first: list[dict[str, Any]],
) -> Study:
    """Run a problem's study to the number of trials that the oracle's tokens pay for.

    Finished trials of earlier runs and of other workers count.  Every trial is drawn by a fresh
    sampler seeded with ``seed`` and the trial's position, so a single process that is killed
    and started again does the same trials as one that was not.

    Args:
        problem: The arrays; its oracle names storage and study.
        max_bytes: Part of what the study is about.
        seed: Part of what the study is about.
        solver: Name of the solver.
        objective: Maps a trial to KL, or to bytes and KL.
        sampler: Makes a sampler from a seed.
        first: Parameters of the first trials.

    Raises:
        ValueError: If the tokens do not pay for one trial, or the study belongs to another problem.
    """
    oracle = problem.oracle
    if oracle is None:
        study, trials = open_study(None, "table", solver), TABLE_TRIALS
    else:
        trials = _affordable(oracle)
        study = open_study(oracle.storage, oracle.study, solver)
    _claim(study, _fingerprint(problem, max_bytes, seed, solver))
    study.sampler = _SeededPerTrial(sampler, seed)
    if not study.get_trials(deepcopy=False):
        for params in first[:trials]:
            study.enqueue_trial(params, skip_if_exists=True)
    one_machine = oracle is not None and (oracle.storage or "").startswith("sqlite")
    run_trials(study, objective, trials, one_machine=one_machine)
    return study


def mean_kl(problem: Problem, choice: NDArray[np.intp]) -> float:
    """Measured KL of a choice on all sequences, or the table's loss without an oracle.

    Returns:
        Nats per token; inf where the model overflowed.
    """
    if problem.oracle is None:
        return problem.evaluate(choice, np.inf).loss
    kl = problem.oracle.mean_kl(choice)
    return np.inf if np.isnan(kl) else kl


def run_trials(
    study: Study, objective: Objective, trials: int, *, one_machine: bool = False
) -> None:
    """Ask for and run trials until ``trials`` of the study are complete, by whichever worker.

    A trial whose worker died goes back to the queue: at once if all workers share one machine,
    else GRACE seconds after its last sign of life.  A trial that raises goes back as well, and
    the error is raised here.  While other workers hold the last trials this one waits, ready to
    take over.

    Args:
        study: The study.
        objective: Maps a trial to its values.
        trials: How many complete trials the study is to have.
        one_machine: Whether all workers run here, so that a process that is gone is dead.
    """
    unclaimed: dict[int, float] = {}
    with _quiet():
        while True:
            fail_stale_trials(study)
            _release_lost(study, unclaimed, one_machine)
            count = Counter(trial.state for trial in study.get_trials(deepcopy=False))
            if count[TrialState.COMPLETE] >= trials:
                return
            taken = count[TrialState.COMPLETE] + count[TrialState.RUNNING]
            if count[TrialState.WAITING] or taken < trials:
                _run_one(study, objective, trials)
            else:
                time.sleep(POLL)


def _run_one(study: Study, objective: Objective, trials: int) -> None:
    """Run the next trial; if others took this worker for dead meanwhile, its result is dropped."""
    started: list[int] = []
    answered = False

    def attempt(trial: Trial) -> float | tuple[float, float]:
        nonlocal answered
        started.append(trial.number)
        trial.set_user_attr("worker", _worker())
        if len(_active(study, trial.number)) >= trials:
            raise _Surplus
        values = objective(trial)
        answered = True
        return values

    try:
        study.optimize(attempt, n_trials=1, catch=(_Surplus,))
    except BaseException as error:
        trial = study.get_trials()[started[0]] if started else None
        if trial is not None and trial.state == TrialState.FAIL:
            if answered and isinstance(error, Exception):
                return
            if not answered:
                RetryHeartbeatStaleTrialCallback(MAX_RETRIES)(study, trial)
        raise


def _active(study: Study, number: int) -> list[FrozenTrial]:
    """The trials before ``number`` that are or may yet be complete."""
    states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
    return [trial for trial in study.get_trials(deepcopy=False)[:number] if trial.state in states]


def _release_lost(study: Study, unclaimed: dict[int, float], one_machine: bool) -> None:
    """Queue trials again that their worker left without, or before, its first heartbeat.

    Args:
        study: The study.
        unclaimed: Trials that no worker has put its name on -> when this was first seen,
            ``time.monotonic()``; kept between calls.
        one_machine: Whether all workers run on this machine.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        if worker is None:
            seen = unclaimed.setdefault(trial.number, time.monotonic())
            lost = time.monotonic() - seen > GRACE
        else:
            lost = one_machine and not _is_alive(worker)
        if lost:
            with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):  # by another
                study.tell(trial.number, state=TrialState.FAIL)
                RetryHeartbeatStaleTrialCallback(MAX_RETRIES)(study, deepcopy(trial))


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


if sys.platform == "win32":

    def _is_alive(worker: str) -> bool:
        return True  # no harmless way to ask: its heartbeat decides

else:

    def _is_alive(worker: str) -> bool:
        host, _, pid = worker.rpartition(":")
        if host != socket.gethostname():
            return True  # the machine was renamed: its heartbeat decides
        try:
            os.kill(int(pid), 0)  # signal 0 only asks
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        return True


class _SeededPerTrial(BaseSampler):
    """Draws every trial from a fresh sampler seeded by the trial's position in the study.

    Optuna's samplers start over with their seed in every process, so a resumed study would draw
    its first parameters again.  The position counts the trials before, without those that only
    repeat a lost one; a repeated trial has the position of the first attempt.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed
        self._sampler = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed the sampler for ``trial``."""
        number = trial.system_attrs.get("failed_trial", trial.number)
        earlier = study.get_trials(deepcopy=False)[:number]
        position = sum("failed_trial" not in t.system_attrs for t in earlier)
        state = np.random.SeedSequence([self._seed, position]).generate_state(1)
        self._sampler = self._make(int(state[0]))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters drawn together."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the parameters that are drawn together."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter by itself."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


def _affordable(oracle: Oracle) -> int:
    """How many trials the oracle's tokens pay for.

    Raises:
        ValueError: If not even one.
    """
    each = oracle.sequences * oracle.length
    trials = (oracle.max_tokens - oracle.tokens) // each
    if trials < 1:
        raise ValueError(
            f"{oracle.max_tokens - oracle.tokens:,} tokens do not pay for one trial, which "
            f"measures {oracle.sequences} sequences of {oracle.length} tokens ({each:,}). "
            "Allow more tokens."
        )
    return trials


def _fingerprint(problem: Problem, max_bytes: int, seed: int, solver: str) -> str:
    """What a study's trials depend on, apart from the model."""
    oracle = problem.oracle
    parts = [solver, max_bytes, seed, problem.units, problem.formats, problem.kinds, problem.layers]
    if oracle is not None:
        parts += [oracle.sequences, oracle.length]
    text = json.dumps(parts).encode()
    arrays = problem.bytes.tobytes() + problem.allowed.tobytes()
    return hashlib.sha256(text + arrays).hexdigest()


def _claim(study: Study, fingerprint: str) -> None:
    """Raise if the study belongs to another problem."""
    if study.user_attrs.setdefault("problem", fingerprint) != fingerprint:
        raise ValueError(
            f"Study {study.study_name!r} was begun for another model, budget, seed or set of "
            "formats or sequences. Give them back, or choose another name for the study."
        )
    study.set_user_attr("problem", fingerprint)


# What a worker on another machine needs to know


class _Published(BaseModel):
    """The part of a published job that search/ itself reads."""

    schema_version: Literal[1]
    solver: str
    max_bytes: int
    seed: int
    max_tokens: int
    units: tuple[str, ...]
    formats: tuple[str, ...]
    kinds: tuple[str, ...]
    layers: tuple[int | None, ...]
    weights: int
    bytes: list[list[int]]
    loss: list[list[float | None]]  # None: not allowed


def job_of(problem: Problem, max_bytes: int, solver: str, seed: int) -> dict[str, Any]:
    """Describe a search as JSON; the caller adds model and settings before publishing it.

    Raises:
        ValueError: If the problem has no oracle: there is nothing to share.
    """
    if problem.oracle is None:
        raise ValueError("A search without an oracle has no work to share with other workers.")
    job = _Published(
        schema_version=1,
        solver=solver,
        max_bytes=max_bytes,
        seed=seed,
        max_tokens=problem.oracle.max_tokens - problem.oracle.tokens,
        units=problem.units,
        formats=problem.formats,
        kinds=problem.kinds,
        layers=problem.layers,
        weights=problem.weights,
        bytes=problem.bytes.tolist(),
        loss=[[x if x < np.inf else None for x in row] for row in problem.loss.tolist()],
    )
    return job.model_dump(mode="json")


def publish(study: Study, job: Mapping[str, Any]) -> None:
    """Leave a job in its study, for workers elsewhere.

    Args:
        study: From `open_study`.
        job: From `job_of`, with whatever else a worker needs to build the same oracle.

    Raises:
        ValueError: If the job lacks something.
    """
    problem_from_job(job)
    study.set_user_attr("job", dict(job))


def read_job(storage: str, name: str | None = None) -> dict[str, Any]:
    """Read the job that was published in a study.

    Args:
        storage: URL of the storage.
        name: Name of the study; None if there is only one with a job.

    Returns:
        The job, with the study's name as ``study``.

    Raises:
        ValueError: If there is no such study, or it has no job.
    """
    with _quiet():
        opened = _open_storage(storage, create=False)
        jobs = {
            summary.study_name: summary.user_attrs.get("job")
            for summary in optuna.get_all_study_summaries(opened, include_best_trial=False)
        }
    there = f"Studies there: {', '.join(map(repr, jobs)) or 'none'}."
    where = _shown(storage)
    if name is None:
        named = [study for study, job in jobs.items() if job is not None]
        if len(named) != 1:
            raise ValueError(
                f"{where} has {len(named)} studies with a job to work on. {there} "
                + ("Name one of them." if named else "Start the search itself first.")
            )
        name = named[0]
    if name not in jobs:
        raise ValueError(f"{where} has no study {name!r}. {there}")
    job = jobs[name]
    if job is None:
        raise ValueError(
            f"Study {name!r} in {where} has no job that workers could read. {there} Start the "
            "search again with this storage: it publishes its job."
        )
    return {**job, "study": name}


def problem_from_job(job: Mapping[str, Any]) -> Problem:
    """The arrays of a published job, without an oracle.

    Raises:
        ValueError: If something is missing or of another shape.
    """
    try:
        read = _Published.model_validate(dict(job))
        return Problem(
            units=read.units,
            formats=read.formats,
            bytes=np.array(read.bytes, dtype=np.int64),
            loss=np.array([[np.inf if x is None else x for x in row] for row in read.loss]),
            weights=read.weights,
            kinds=read.kinds,
            layers=read.layers,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = f"{where}: {first['msg']}"
    except ValueError as error:
        problem = str(error)
    raise ValueError(
        f"The published job cannot be read ({problem}). Run the search and its workers with the "
        "same version of bitplan."
    )


def work(storage: str, name: str | None, oracle: Oracle) -> int:
    """Work on a published job until its study is complete.

    Args:
        storage: URL of the storage.
        name: Name of the study; None if there is only one with a job.
        oracle: Measures the job's model on the job's sequences.  Storage, study and tokens are
            set to the job's.

    Returns:
        How many trials this process completed.

    Raises:
        ValueError: If there is no such job, or the oracle measures on other sequences.
    """
    job = read_job(storage, name)
    oracle.storage, oracle.study = storage, job["study"]
    oracle.max_tokens = oracle.tokens + job["max_tokens"]
    problem = replace(problem_from_job(job), oracle=oracle)
    study = open_study(storage, oracle.study, job["solver"])
    before = _completed_here(study)
    SOLVERS.get(job["solver"])(problem, job["max_bytes"], seed=job["seed"])
    return _completed_here(study) - before


def _completed_here(study: Study) -> int:
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sum(trial.user_attrs.get("worker") == _worker() for trial in complete)


def _open_storage(url: str, create: bool = True) -> RDBStorage:
    """Connect to a database and create Optuna's tables if they are missing.

    Raises:
        ValueError: If the URL, the driver or the connection is at fault.
    """
    address = _parse(url)
    options: dict[str, Any] = {"pool_pre_ping": True}  # servers drop idle connections
    if address.get_backend_name() == "sqlite":
        options = {"connect_args": {"timeout": 60}}  # seconds to wait for another writer
        if address.database:
            path = Path(address.database)
            if not create and not path.is_file():
                raise ValueError(f"There is no file {path} to find a study in.")
            path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return RDBStorage(
            address.render_as_string(hide_password=False),
            engine_kwargs=options,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
        )
    except ImportError as error:
        raise ValueError(
            f"{_shown(url)} needs a database driver that is not installed ({error.__cause__}). "
            "For PostgreSQL: pip install 'bitplan[postgresql]'."
        ) from error
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise ValueError(
            f"{_shown(url)} cannot be opened: {reason} Check that the server runs, the database "
            "exists and the user may write to it."
        ) from error


def _parse(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise ValueError(
            f"{url.rpartition('@')[2]!r} is not a storage URL. Write it like "
            "sqlite:///runs/demo/job.sqlite or postgresql://user:password@host/database."
        ) from error
    if address.drivername in ("postgres", "postgresql"):
        return address.set(drivername="postgresql+psycopg")  # the driver of bitplan[postgresql]
    return address


def _shown(url: str) -> str:
    """The URL without its password."""
    return _parse(url).render_as_string(hide_password=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from reporting every trial; trials that fail are raised here anyway."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield

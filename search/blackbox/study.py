"""Optuna studies that several processes or machines work on, and survive any of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import TrialState
from pydantic import BaseModel, ValidationError

from ..oracle import Oracle
from ..problem import Problem
from ..solvers import SOLVERS, abilities, solvers_that
from .storage import open_storage, quiet, shown
from .trials import Objective, SeededPerTrial, run_trials, worker_name

TABLE_TRIALS = 20  # without an oracle


def open_study(storage: str | None, name: str, solver: str) -> Study:
    """Open the study of a search, or begin it.

    Args:
        storage: URL such as ``sqlite:///job.sqlite`` (one machine) or
            ``postgresql://user:password@host/database``; None keeps the study in memory.
        name: Name of the study.
        solver: Name of the solver, whose ``objectives`` the trials minimize.

    Raises:
        ValueError: If the storage cannot be opened, or the study has other objectives.
    """
    goals = abilities(solver).objectives
    if not goals:
        raise ValueError(
            f"Only {' and '.join(solvers_that('objectives'))} keep an Optuna study; {solver!r} "
            "does not."
        )
    with quiet():
        study = optuna.create_study(
            storage=None if storage is None else open_storage(storage),
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
    first: Sequence[Mapping[str, float]],
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
    study.sampler = SeededPerTrial(sampler, seed, first)
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


def _affordable(oracle: Oracle) -> int:
    """How many trials the oracle's tokens pay for.

    Raises:
        ValueError: If not even one.
    """
    each = oracle.sequences * oracle.length
    trials = (oracle.max_tokens - oracle.tokens) // each
    if trials < 1:
        raise ValueError(
            f"{oracle.amount(oracle.max_tokens - oracle.tokens)} do not pay for one trial, which "
            f"measures {oracle.amount(each)}. Allow more (--search-tokens)."
        )
    return trials


def _fingerprint(problem: Problem, max_bytes: int, seed: int, solver: str) -> str:
    """What a study's trials depend on; the table's losses stand for the model and its text."""
    oracle = problem.oracle
    parts = [solver, max_bytes, seed, problem.units, problem.formats, problem.kinds, problem.layers]
    if oracle is not None:
        parts += [oracle.sequences, oracle.length]
    text = json.dumps(parts).encode()
    arrays = problem.bytes.tobytes() + problem.loss.tobytes()
    return hashlib.sha256(text + arrays).hexdigest()


def _claim(study: Study, fingerprint: str) -> None:
    """Raise if the study belongs to another problem."""
    if study.user_attrs.setdefault("problem", fingerprint) != fingerprint:
        raise ValueError(
            f"Study {study.study_name!r} was begun for another profile, budget, seed or set of "
            "sequences. Give them back, or choose another name for the study."
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
    opened = open_storage(storage, create=False)
    jobs = {
        summary.study_name: summary.user_attrs.get("job")
        for summary in optuna.get_all_study_summaries(opened, include_best_trial=False)
    }
    there = f"Studies there: {', '.join(map(repr, jobs)) or 'none'}."
    where = shown(storage)
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
    return sum(trial.user_attrs.get("worker") == worker_name() for trial in complete)

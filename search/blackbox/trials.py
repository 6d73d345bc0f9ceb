"""Run the trials of an Optuna study once each, whichever of its workers die."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from . import storage
from .storage import queue_again, quiet

POLL = 1.0  # seconds between two looks at a study in which others hold the last trials

Objective = Callable[[Trial], float | tuple[float, float]]


class _Surplus(Exception):
    """This trial is more than the study needs: another worker asked at the same time."""


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
    with quiet():
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
        trial.set_user_attr("worker", worker_name())
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
                queue_again(study, trial)
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
            lost = time.monotonic() - seen > storage.GRACE
        else:
            lost = one_machine and not _is_alive(worker)
        if lost:
            with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):  # by another
                study.tell(trial.number, state=TrialState.FAIL)
                queue_again(study, deepcopy(trial))


def worker_name() -> str:
    """This process among all workers: machine and process id."""
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


class SeededPerTrial(BaseSampler):
    """Draws every trial from a fresh sampler seeded by the trial's position in the study.

    Optuna's samplers start over with their seed in every process, so a resumed study would draw
    its first parameters again.  The position counts the trials before, without those that only
    repeat a lost one; a repeated trial has the position of the first attempt.

    Args:
        make: Makes a sampler from a seed.
        seed: Seed of the search.
        first: Parameters of the trials at the first positions, which are not drawn.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        seed: int,
        first: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self._make = make
        self._seed = seed
        self._first = first
        self._sampler: BaseSampler  # of the trial at hand, like what follows
        self._given: Mapping[str, float] = {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed the sampler for ``trial``."""
        number = trial.system_attrs.get("failed_trial", trial.number)
        earlier = study.get_trials(deepcopy=False)[:number]
        position = sum("failed_trial" not in t.system_attrs for t in earlier)
        state = np.random.SeedSequence([self._seed, position]).generate_state(1)
        self._sampler = self._make(int(state[0]))
        self._given = self._first[position] if position < len(self._first) else {}
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
        drawn = self._sampler.sample_relative(study, trial, search_space)
        return drawn | {name: value for name, value in self._given.items() if name in drawn}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter by itself."""
        if param_name in self._given:
            return self._given[param_name]
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

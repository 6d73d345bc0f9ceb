"""Black-box search of all budgets at once: formats of unit groups, evolved by Optuna."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.trial import Trial, TrialState

from ..hull import lower_hull
from ..levels import Groups
from ..problem import Problem, Solution
from ..study import mean_kl, search
from . import SOLVERS

POPULATION = 20


@SOLVERS.register("nsga2")
def nsga2(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Evolve the front of bytes and measured KL with NSGA-II; several workers may share it.

    One variable per group of units (kind and third of the depth) is the group's format, in order
    of bytes.  The first trials are the uniform plans.  The whole front stays in the study.

    Args:
        problem: The table as arrays; its oracle measures and names the storage.  Without one the
            table's loss is searched, in memory and for few trials.
        max_bytes: The most bytes the plan may take.
        seed: Draws the formats.

    Returns:
        The trial with the least KL that fits in ``max_bytes``.  If none fits, the smallest trial
        with all groups moved down together until it does, which is not measured.  Loss and lower
        bound are those of the table.

    Raises:
        ValueError: If nothing fits, the problem has further constraints, the oracle's tokens do
            not pay for one trial, or the storage cannot be used.

    References:
        Deb et al. (2002), "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II"; Akiba et
        al. (2019), "Optuna: A Next-generation Hyperparameter Optimization Framework".
    """
    problem.check_feasible(max_bytes)
    groups = Groups.build(problem)

    def places(params: Mapping[str, int]) -> NDArray[np.float64]:
        return np.array([params[name] for name in groups.names], dtype=np.float64)

    def objective(trial: Trial) -> tuple[float, float]:
        params = {name: trial.suggest_int(name, 0, groups.highest) for name in groups.names}
        choice = groups.nearest(places(params))
        return float(problem.evaluate(choice, np.inf).bytes), mean_kl(problem, choice)

    uniform = [dict.fromkeys(groups.names, level) for level in range(groups.highest + 1)]
    study = search(problem, max_bytes, seed, "nsga2", objective, _sampler, uniform)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    fitting = [trial for trial in trials if trial.values[0] <= max_bytes]
    if fitting:
        choice = groups.nearest(places(min(fitting, key=lambda t: t.values[1]).params))
    else:
        smallest = min(trials, key=lambda t: t.values[0])
        choice = groups.fit(places(smallest.params), max_bytes, seed)
    bound = lower_hull(problem).relax(problem, max_bytes).bound
    return problem.evaluate(choice, bound)


def _sampler(seed: int) -> BaseSampler:
    return NSGAIISampler(population_size=POPULATION, seed=seed)

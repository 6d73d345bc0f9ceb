"""Black-box search of all budgets at once: bytes and group preferences, evolved by Optuna."""

from __future__ import annotations

import numpy as np
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.trial import Trial, TrialState

from ..blackbox.study import mean_kl, search
from ..hull import lower_hull
from ..levels import Groups
from ..problem import Problem, Solution
from . import SOLVERS

POPULATION = 20
FIRST_SIZES = 6
BYTES = "bytes"  # the variable; groups have other names


@SOLVERS.register("nsga2", needs_oracle=True, objectives=("bytes", "kl"))
def nsga2(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Evolve the front of bytes and measured KL with NSGA-II; several workers may share it.

    The variables are the bytes of the plan and, per group of units (kind and third of the
    depth), how many formats the group is ahead of the others.  The first trials prefer no group,
    at ``max_bytes`` and at FIRST_SIZES from the smallest plan to the largest.  The whole front
    stays in the study.

    Args:
        problem: The table as arrays; its oracle measures and names the storage.  Without one the
            table's loss is searched, in memory and for few trials.
        max_bytes: The most bytes the plan may take.
        seed: Draws the variables and which units of a group get the last bytes.

    Returns:
        The trial with the least KL that fits in ``max_bytes``; if none fits, the preferences of
        the smallest one, filled to ``max_bytes``.  Loss and lower bound are those of the table.

    Raises:
        ValueError: If nothing fits, the problem has further constraints, the oracle's tokens do
            not pay for one trial, or the storage cannot be used.

    References:
        Deb et al. (2002), "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II"; Akiba et
        al. (2019), "Optuna: A Next-generation Hyperparameter Optimization Framework".

    Example:
        >>> from bitplan.testing import toy_problem
        >>> problem = toy_problem(oracle_plans=64)  # its oracle contradicts the table
        >>> plan = nsga2(problem, max_bytes=112)
        >>> plan.choice.tolist(), plan.loss, round(problem.oracle.mean_kl(plan.choice), 3)
        ([1, 1, 1, 0], 0.29296875, 0.176)
    """
    problem.check_feasible(max_bytes)
    groups = Groups.build(problem)

    ladder = groups.ladder
    least, most = (max(1, ladder.size(level)) for level in (np.zeros_like(ladder.top), ladder.top))

    def objective(trial: Trial) -> tuple[float, float]:
        limit = trial.suggest_int(BYTES, least, most, log=True)
        preferences = {group: trial.suggest_float(group, -1, 1) for group in groups.names}
        choice = groups.fit(preferences, limit, seed)
        return float(problem.evaluate(choice, np.inf).bytes), mean_kl(problem, choice)

    sizes = np.append(max_bytes, np.geomspace(least, most, FIRST_SIZES)).clip(least, most)
    even = dict.fromkeys(groups.names, 0.0)
    first = [{BYTES: int(size)} | even for size in sizes.tolist()]
    study = search(problem, max_bytes, seed, "nsga2", objective, _sampler, first)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    fitting = [trial for trial in trials if trial.values[0] <= max_bytes]
    best = min(fitting or trials, key=lambda trial: trial.values[1 if fitting else 0])
    limit = best.params[BYTES] if fitting else max_bytes
    choice = groups.fit(best.params, limit, seed)
    bound = lower_hull(problem).relax(problem, max_bytes).bound
    return problem.evaluate(choice, bound)


def _sampler(seed: int) -> BaseSampler:
    return NSGAIISampler(population_size=POPULATION, seed=seed)

"""Black-box search of one budget: preferences of unit groups, sampled by Optuna."""

from __future__ import annotations

from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import Trial

from ..blackbox.study import mean_kl, search
from ..hull import lower_hull
from ..levels import Groups
from ..problem import Problem, Solution
from . import SOLVERS


@SOLVERS.register("tpe", needs_oracle=True, objectives=("kl",))
def tpe(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Search group preferences on measured KL with Optuna's TPE; several workers may share it.

    One variable per group of units (kind and third of the depth) says how many formats the
    group is ahead of others; all are moved up or down together until the plan fills
    ``max_bytes``, so every trial is a plan that fits.  The first trial prefers no group.

    Args:
        problem: The table as arrays; its oracle measures and names the storage.  Without one the
            table's loss is searched, in memory and for few trials.
        max_bytes: The most bytes the plan may take.
        seed: Draws the preferences and which units of a group get the last bytes.

    Returns:
        The trial with the least KL; loss and lower bound are those of the table.

    Raises:
        ValueError: If nothing fits, the problem has further constraints, the oracle's tokens do
            not pay for one trial, or the storage cannot be used.

    References:
        Bergstra et al. (2011), "Algorithms for Hyper-Parameter Optimization"; Akiba et al. (2019),
        "Optuna: A Next-generation Hyperparameter Optimization Framework".

    Example:
        >>> from bitplan.testing import toy_problem
        >>> problem = toy_problem(oracle_plans=64)  # its oracle contradicts the table
        >>> plan = tpe(problem, max_bytes=112)
        >>> plan.choice.tolist(), plan.loss, round(problem.oracle.mean_kl(plan.choice), 3)
        ([1, 1, 1, 0], 0.29296875, 0.176)
    """
    problem.check_feasible(max_bytes)
    groups = Groups.build(problem)

    def objective(trial: Trial) -> float:
        preferences = {group: trial.suggest_float(group, -1, 1) for group in groups.names}
        return mean_kl(problem, groups.fit(preferences, max_bytes, seed))

    even = dict.fromkeys(groups.names, 0.0)
    study = search(problem, max_bytes, seed, "tpe", objective, _sampler, [even])
    bound = lower_hull(problem).relax(problem, max_bytes).bound
    return problem.evaluate(groups.fit(study.best_params, max_bytes, seed), bound)


def _sampler(seed: int) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=False, constant_liar=True)

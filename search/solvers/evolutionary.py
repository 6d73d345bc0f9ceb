"""Evolutionary search on measured KL: mutate at constant bytes, re-measure the survivors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..hull import lower_hull
from ..levels import Ladder
from ..oracle import Oracle
from ..problem import Problem, Solution
from . import SOLVERS

OFFSPRING = 16  # children per generation
STAGES = 3
KEPT = 4  # one child in KEPT goes on to the next stage, on KEPT times the sequences
GENERATIONS = 20  # that the tokens should at least pay for; else fewer sequences are measured
LEAST_SEQUENCES: int = KEPT ** (STAGES - 1)  # so that every stage has one
MOST_SWITCHES = 3  # level switches per child, at most
TABLE_GENERATIONS = 40  # without an oracle
IDLE_GENERATIONS = 30  # that ask nothing new: every plan in reach is known

Level = NDArray[np.intp]


@SOLVERS.register("evolutionary", needs_oracle=True)
def evolutionary(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Improve the certified plan on measured KL by level switches at constant bytes (EvoPress).

    Every generation mutates the best plan so far into OFFSPRING children and measures them in
    STAGES, on a few sequences, then the best of them on more, at last on all.  In every stage
    children that do not beat their parent on the same sequences are dropped, so no generation
    makes the mean KL on all sequences worse.  "All" are as many of the oracle's sequences as
    leave tokens for GENERATIONS generations, from LEAST_SEQUENCES on.  The search ends before the
    oracle's tokens do.

    Args:
        problem: The table as arrays; its oracle measures.  Without one the plan is judged by the
            table, for TABLE_GENERATIONS generations.
        max_bytes: The most bytes the plan may take.
        seed: Draws the mutations and the sequences of the early stages.

    Returns:
        The best plan; loss and lower bound are those of the table.

    Raises:
        ValueError: If nothing fits, the problem has further constraints, or the oracle's tokens
            do not suffice to measure one plan.

    References:
        Sieberling et al. (2024), "EvoPress: Accurate Dynamic Model Compression via Evolutionary
        Search", arXiv 2410.14649.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> problem = toy_problem(oracle_plans=64)  # its oracle contradicts the table
        >>> plan = evolutionary(problem, max_bytes=112)
        >>> plan.choice.tolist(), plan.loss, round(problem.oracle.mean_kl(plan.choice), 3)
        ([1, 1, 1, 0], 0.29296875, 0.176)
    """
    start = SOLVERS.get("certified")(replace(problem, oracle=None), max_bytes, seed=seed)
    return evolve(problem, start.choice, max_bytes, seed)


def evolve(problem: Problem, start: NDArray[np.intp], max_bytes: int, seed: int) -> Solution:
    """Search from the choice ``start`` [U], which fits in ``max_bytes``; see `evolutionary`."""
    ladder = Ladder.build(problem)
    generator = np.random.default_rng(seed)
    parent = ladder.level(start)
    if problem.oracle is None:
        parent = _evolve_on_table(problem, ladder, parent, max_bytes, generator)
    else:
        parent = _evolve_on_oracle(problem.oracle, ladder, parent, max_bytes, generator)
    bound = lower_hull(problem).relax(problem, max_bytes).bound
    return problem.evaluate(ladder.choice(parent), bound)


def _evolve_on_table(
    problem: Problem, ladder: Ladder, parent: Level, max_bytes: int, generator: np.random.Generator
) -> Level:
    rows = np.arange(len(parent))
    for _ in range(TABLE_GENERATIONS):
        family = [parent, *_offspring(ladder, parent, max_bytes, generator)]
        loss = [problem.loss[rows, ladder.choice(level)].sum() for level in family]
        parent = family[int(np.argmin(loss))]  # of equals the parent
    return parent


def _evolve_on_oracle(
    oracle: Oracle, ladder: Ladder, parent: Level, max_bytes: int, generator: np.random.Generator
) -> Level:
    everything = range(_sequences(oracle))
    stages = [max(1, len(everything) // KEPT**later) for later in reversed(range(STAGES))]
    family = [OFFSPRING // KEPT**stage for stage in range(STAGES)]
    generation = sum(f * s for f, s in zip(family, stages, strict=True)) * oracle.length
    if oracle.spent(len(everything) * oracle.length):
        raise ValueError(
            f"{oracle.amount(oracle.max_tokens - oracle.tokens)} are too few to measure even the "
            f"first plan, which takes {oracle.amount(len(everything) * oracle.length)}. Allow more "
            f"(--search-tokens): a generation takes up to {generation:,}."
        )
    _kl(oracle, ladder, [parent], everything)  # the parent is known wherever children are measured
    idle = 0
    while idle < IDLE_GENERATIONS and not oracle.spent(generation):
        before = oracle.tokens
        children = _offspring(ladder, parent, max_bytes, generator)
        for count, length in zip(family, stages, strict=True):
            first = int(generator.integers(len(everything) - length + 1))
            kl = _kl(oracle, ladder, [parent, *children], range(first, first + length))
            order = kl.argsort(kind="stable").tolist()
            better = order[: order.index(0)][: max(1, count // KEPT)]
            children = [children[i - 1] for i in better]
        parent = children[0] if children else parent
        idle = 0 if oracle.tokens > before else idle + 1
    return parent


def _sequences(oracle: Oracle) -> int:
    """Sequences to measure on: the first plan takes each once, a generation STAGES times."""
    affordable = (oracle.max_tokens - oracle.tokens) // oracle.length
    wanted = max(LEAST_SEQUENCES, affordable // (1 + GENERATIONS * STAGES))
    return min(oracle.sequences, wanted)


def _kl(
    oracle: Oracle, ladder: Ladder, levels: Sequence[Level], sequences: range
) -> NDArray[np.float64]:
    """Mean measured KL of every plan [B], nats per token; inf where the model overflowed."""
    kl = oracle.kl([ladder.choice(level) for level in levels], sequences).mean(axis=1)
    return np.where(np.isnan(kl), np.inf, kl)


def _offspring(
    ladder: Ladder, parent: Level, max_bytes: int, generator: np.random.Generator
) -> list[Level]:
    """OFFSPRING mutations of the parent, without repeats of it or of each other.

    Each is of as many switches as the smaller of two uniform draws from 1..MOST_SWITCHES.
    """
    known = {parent.tobytes()}
    children = []
    for _ in range(OFFSPRING):
        child = parent
        for _ in range(generator.integers(1, MOST_SWITCHES + 1, 2).min()):
            child = switch_levels(ladder, child, max_bytes, generator)
        if child.tobytes() not in known:
            known.add(child.tobytes())
            children.append(child)
    return children


def switch_levels(
    ladder: Ladder, level: Level, max_bytes: int, generator: np.random.Generator
) -> Level:
    """Raise one random unit a level, lower random others until it fits, spend what is left.

    Of the lowered units those that turn out not to be needed are raised again first, so the bytes
    stay as near to ``max_bytes`` as the last plan's.  Half of the time only units are lowered
    whose step has the bytes of the raised one, if there are any: an exact exchange.

    Returns:
        intp [U], the new levels; the old ones if no unit can be raised.
    """
    open_ = np.flatnonzero(level < ladder.top)
    if not len(open_):
        return level
    raised = int(generator.choice(open_))
    others = generator.permutation(len(level))
    others = others[others != raised]
    level = level.copy()
    cost = int(ladder.bytes[raised, level[raised] + 1] - ladder.bytes[raised, level[raised]])
    missing = ladder.size(level) + cost - max_bytes

    lower = others[level[others] > 0]
    freed = ladder.bytes[lower, level[lower]] - ladder.bytes[lower, level[lower] - 1]
    if generator.random() < 0.5 and (freed == cost).any():
        lower, freed = lower[freed == cost], freed[freed == cost]
    count = int(np.searchsorted(freed.cumsum(), missing)) + 1 if missing > 0 else 0
    if count > len(lower):
        return level  # nothing can pay for this one
    lower = lower[:count]
    level[raised] += 1
    level[lower] -= 1
    rest = others[(level[others] < ladder.top[others]) & ~np.isin(others, lower)]
    spend = np.concatenate((lower, rest))
    return ladder.climb(level, spend, level[spend], max_bytes)

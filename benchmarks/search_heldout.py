"""Plans of `fisher` and its parts by the prices of sequences that they were not solved from.

A quadratic form has no luck in it: how the errors of a plan's units act on each other is left out,
so small differences between scores show that measured KL hides.
"""

from __future__ import annotations

import numpy as np

from bitplan.benchmarks.search_lab import Lab, Part, Row, ratio
from bitplan.benchmarks.search_rivals import PARTS, table_of
from bitplan.search.problem import Problem
from bitplan.search.solvers import SOLVERS

BUDGETS = ("3.28bpw", "3.5bpw", "3.8bpw", "4.1bpw", "4.3bpw", "4.5bpw")
SCORES = ("fisher", *PARTS)


def heldout(lab: Lab) -> Part:
    """Price every seed's plans by the per-sequence scores of all other seeds."""
    seeds = range(lab.settings.seeds)
    if len(seeds) < 2:
        return Part({})
    squares = {}
    for seed in seeds:
        scores = table_of(lab, "fisher", seed).scores
        assert scores is not None
        squares[seed] = scores.astype(np.float64) ** 2
    units = np.arange(len(lab.units))
    rows: list[Row] = []
    for budget in BUDGETS:
        found, predicted = {}, {}
        for score in SCORES:
            solutions = {}
            for seed in seeds:
                problem = Problem.from_table(table_of(lab, score, seed))
                solutions[seed] = SOLVERS.get("certified")(problem, lab.max_bytes(budget))
            predicted[score] = float(np.mean([s.loss for s in solutions.values()]))
            costs = {  # of the seed's plan on the sequences of another one [sequences]
                (seed, other): squares[other][:, units, solutions[seed].choice].sum(axis=1)
                for seed in seeds
                for other in seeds
                if other != seed
            }
            found[score] = np.concatenate(
                [np.mean([costs[s, other] for s in seeds if s != other], axis=0) for other in seeds]
            )
        for score in SCORES:
            value, stderr = ratio(found[score], found["fisher"])
            rows.append(
                {
                    "budget": budget,
                    "score": score,
                    "predicted": predicted[score],
                    "by other sequences": float(found[score].mean()),
                    "predicted / by others": predicted[score] / float(found[score].mean()),
                    "by others / fisher": value,
                    "± stderr": stderr,
                }
            )
    note = (
        "Prices of other sequences: every seed's plan, priced by the plain probe of the sequences "
        f"of the other seeds ({len(seeds)} seeds; mean over all pairs, errors paired over "
        "sequences). Nats per token, interactions between units left out."
    )
    return Part({"Prices of other sequences": rows}, notes=[note])

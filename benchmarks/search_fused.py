"""Scores where a runtime fuses matrices: q/k/v and gate/up share one format, as ModelOpt has it."""

from __future__ import annotations

import numpy as np

from bitplan.benchmarks.search_lab import BUDGETS, LENGTH, Lab, Part, Row, ratio, target
from bitplan.benchmarks.search_rivals import LIKE, table_of
from bitplan.models.measure import standard_error
from bitplan.search.oracle import Choice
from bitplan.search.problem import Problem
from bitplan.search.solvers import SOLVERS

GROUPS = ("q_proj,k_proj,v_proj", "gate_proj,up_proj")
RIVAL = "output_fisher"
SCORES = ("fisher", RIVAL)
SHARE = 2  # of the test text


def fused(lab: Lab) -> Part:
    """Measure the plans of both scores with and without fused matrices, for every seed."""
    seeds = range(lab.settings.seeds)
    plans = {
        (budget, score, groups, seed): _plan(lab, budget, score, groups, seed)
        for budget in BUDGETS
        for score in SCORES
        for groups in ((), GROUPS)
        for seed in seeds
    }
    measured = lab.measure(plans, SHARE)
    tables, targets = {}, []
    for budget in BUDGETS:
        rows: list[Row] = []
        for groups in ((), GROUPS):
            count = min(len(m.kl) for m in measured.values())
            kl = {
                score: np.stack([measured[budget, score, groups, s].kl[:count] for s in seeds])
                for score in SCORES
            }
            for score in SCORES:
                ratios = kl[score].mean(axis=1) / kl["fisher"].mean(axis=1)
                value, stderr = ratio(kl[score].mean(axis=0), kl["fisher"].mean(axis=0))
                row: Row = {
                    "matrices": "q/k/v and gate/up fused" if groups else "apart",
                    "score": score,
                    "like": LIKE[score],
                    "tokens": count * LENGTH,
                    "KL": float(kl[score].mean()),
                    "± seeds": standard_error(kl[score].mean(axis=1)) if len(seeds) > 1 else None,
                    "KL / fisher": value,
                    "ratio ± seeds": standard_error(ratios),
                    "ratio ± tokens": stderr,
                }
                rows.append(row)
        tables[f"Fused matrices at {budget}"] = rows
        error = float(np.hypot(row["ratio ± seeds"], row["ratio ± tokens"]))
        text = f"{budget}, fused matrices: KL of {RIVAL} / fisher"
        targets.append(target(text, ">= 1", row["KL / fisher"], error))
    note = (
        f"Fused matrices: {' and '.join(f'`{rule}`' for rule in GROUPS)} share one format, as "
        "runtimes that run them as one matrix want it; prices are fused after the profile. "
        f"{len(seeds)} calibration seeds. `ratio ± seeds` is the standard error over seeds, "
        "`ratio ± tokens` that over the test sequences, paired."
    )
    return Part(tables, targets, [note])


def _plan(lab: Lab, budget: str, score: str, groups: tuple[str, ...], seed: int) -> Choice:
    """The certified plan of the fused table, as one format for every matrix of the lab."""
    table = table_of(lab, score, seed).merged(groups)
    solution = SOLVERS.get("certified")(Problem.from_table(table), lab.max_bytes(budget))
    pairs = zip(table.units, solution.choice.tolist(), strict=True)
    chosen = {name: f for unit, f in pairs for name in unit.modules}
    return np.array([chosen[unit.modules[0]] for unit in lab.units], dtype=np.intp)

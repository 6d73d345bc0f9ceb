"""Rival scores on the same renderings, the same bytes and the same solver: only the score differs.

The scores of one pass are computed together; each is what its file in ``sensitivity/metrics``
computes alone, up to the scale of those that are not in nats: a scale does not change a solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from bitplan.benchmarks.search_lab import BUDGETS, LENGTH, Lab, Part, Row, ratio, target
from bitplan.models.measure import Measurement, standard_error
from bitplan.search.problem import Problem, Solution
from bitplan.search.solvers import SOLVERS
from bitplan.sensitivity.errors import squared_errors
from bitplan.sensitivity.estimate import _prices, provenance
from bitplan.sensitivity.factors import absolute, gradient_norm, inner, squared
from bitplan.sensitivity.metrics import METRICS, Scores, Task
from bitplan.sensitivity.metrics._gradient_scores import gradient_scores
from bitplan.sensitivity.metrics.output_fisher import output_squared
from bitplan.sensitivity.probes import data_upstream, label_upstream
from bitplan.sensitivity.shrinkage import Shrinkage
from bitplan.sensitivity.table import SensitivityTable, stored_bytes

TEXT_SEQUENCES = 32  # of the scores whose labels come from the text
PARTS = ("fisher_probe", "fisher_diagonal")  # what `fisher` combines
LIKE = {
    "fisher": "the default",
    "fisher_probe": "part of it",
    "fisher_diagonal": "part of it",
    "fisher_trace": "HAWQ-V2",
    "output_fisher": "ModelOpt",
    "taylor": "AutoScheme",
    "imatrix": "llama.cpp",
    "weight_mse": "data-free",
    "random": "null control",
    "shuffled": "null control",
}
SHARE = 2  # of the test text for all others
CONTROLS = ("random", "shuffled")  # solvers, on the table of `fisher`
IN_NATS = ("fisher", *PARTS, "fisher_trace", *CONTROLS)
DETERMINISTIC = ("weight_mse",)  # no data, no seed

Name = tuple[str, str, int]  # budget, score, seed


def labelled_scores(task: Task) -> dict[str, Scores]:
    """The scores of a pass with labels sampled from the model."""
    upstream = label_upstream(torch.Generator().manual_seed(task.seed))
    (products, squares, norms), positions = gradient_scores(
        task, upstream, [inner, squared, gradient_norm]
    )
    probe = (products / np.sqrt(2 * positions)).astype(np.float32)
    diagonal = squares / (2 * positions)
    errors = np.zeros((len(task.units), len(task.formats)))
    for u, unit in enumerate(task.units):
        for name in unit.modules:
            errors[u] += squared_errors(task.renderer, name, task.formats) / unit.weights
    trace = (norms / (2 * positions) * errors).astype(np.float32)
    return {
        "fisher": Scores(probe, signed=True, in_nats=True, diagonal=diagonal.mean(axis=0)),
        "fisher_probe": Scores(probe, signed=True, in_nats=True),
        "fisher_diagonal": Scores(diagonal.astype(np.float32), signed=False, in_nats=True),
        "fisher_trace": Scores(trace, signed=False, in_nats=True),
    }


def text_scores(task: Task) -> dict[str, Scores]:
    """The scores of a pass with the next token of the text as label, on fewer sequences.

    ``output_fisher`` takes a matrix product per format and sequence. The tokens are as many as
    AutoScheme takes by default, and both scores have little noise.
    """
    few = replace(task, samples=task.samples.head(TEXT_SEQUENCES))
    upstream = data_upstream(torch.Generator().manual_seed(task.seed), True)
    found, positions = gradient_scores(few, upstream, [output_squared, absolute], unlabelled=1)
    outputs, weights = (found / positions).astype(np.float32)
    return {
        "output_fisher": Scores(outputs, signed=False, in_nats=False),
        "taylor": Scores(weights, signed=False, in_nats=False),
    }


PASSES: dict[tuple[str, ...], Callable[[Task], dict[str, Scores]]] = {
    ("fisher", "fisher_probe", "fisher_diagonal", "fisher_trace"): labelled_scores,
    ("output_fisher", "taylor"): text_scores,
    ("imatrix",): lambda task: {"imatrix": METRICS.get("imatrix")(task)},
    ("weight_mse",): lambda task: {"weight_mse": METRICS.get("weight_mse")(task)},
}


def table_of(lab: Lab, metric: str, seed: int) -> SensitivityTable:
    """The table of a metric, from the work folder or from the pass that gives it."""
    folder = lab.work / "tables"
    path = folder / f"{metric}-seed{seed}.safetensors"
    if not path.exists():
        names, score = next(entry for entry in PASSES.items() if metric in entry[0])
        title = f"Scoring {', '.join(names)} (seed {seed})"
        with lab.reporter.bar(title, lab.settings.sequences) as advance:
            task = lab.task(seed, advance)
            found = score(task)
        for name, scores in found.items():
            _tabulate(task, name, scores).save(folder / f"{name}-seed{seed}.safetensors")
    return SensitivityTable.load(path)


def _tabulate(task: Task, metric: str, scores: Scores) -> SensitivityTable:
    """The table that a profile makes of the scores, without a fitted scale."""
    if scores.diagonal is None:
        kl, stderr = _prices(scores)
    else:
        shrinkage = Shrinkage(scores.values, scores.diagonal, [unit.kind for unit in task.units])
        kl, stderr = shrinkage.prices(), shrinkage.stderr()
    values = scores.values if scores.signed else np.sqrt(np.maximum(scores.values, 0))
    return SensitivityTable(
        units=tuple(task.units),
        formats=tuple(fmt.name for fmt in task.formats),
        bytes=stored_bytes(task.units, task.formats),
        kl=kl,
        stderr=stderr,
        scores=values if len(values) > 1 else None,
        diagonal=scores.diagonal,
        signed=scores.signed,
        provenance=provenance(
            task.model,
            task.units,
            task.formats,
            task.samples,
            metric,
            "rtn",
            task.seed,
            selected=True,
        ),  # the lab takes the layers only
    )


def rivals(lab: Lab) -> Part:
    """Measure the plan of every score at every budget, for every seed."""
    seeds = range(lab.settings.seeds)
    solutions = {
        (budget, score, seed): _solve(lab, budget, score, seed)
        for seed in seeds
        for score in LIKE
        if seed == 0 or score not in DETERMINISTIC
        for budget in BUDGETS
    }
    plans = {name: solution.choice for name, solution in solutions.items()}
    plans |= {(budget, uniform, 0): lab.uniform(budget) for budget, uniform in BUDGETS.items()}
    whole = {name: plan for name, plan in plans.items() if name[1] in ("fisher", *PARTS)}
    measured = lab.measure(plans, SHARE) | lab.measure(whole)
    tables, targets, notes = {}, [], []
    for budget, uniform in BUDGETS.items():
        rows = [_row(lab, budget, score, solutions, measured, plans) for score in (*LIKE, uniform)]
        rows.sort(key=lambda row: row["KL"])
        tables[f"Scores at {budget}"] = rows
        others = [row for row in rows if row["score"] in LIKE and row["score"] != "fisher"]
        parts = [row for row in others if row["score"] in PARTS]
        for kind, compared in (("another score", others), ("one of its parts", parts)):
            best = min(compared, key=lambda row: row["KL / fisher"])
            text = f"{budget}: least KL of {kind} ({best['score']}) / fisher"
            targets.append(target(text, ">= 1", best["KL / fisher"], _stderr(best)))
        notes.append(_verdict(budget, others, parts))
    notes.append(
        f"Scores: the certified plan of every score, {len(seeds)} calibration seeds of "
        f"{lab.settings.sequences} sequences. `± seeds` is the standard error over seeds, "
        "`± tokens` that over the test sequences (averaged over seeds; of the ratio: paired, on "
        "the same tokens). Scores that are not in nats need a fitted scale to predict a KL, "
        "which does not change the plan and is left out here. `output_fisher` and `taylor` "
        f"are priced on the first {TEXT_SEQUENCES} sequences. `random` and `shuffled` see the "
        "table of `fisher`."
    )
    return Part(tables, targets, notes)


def _solve(lab: Lab, budget: str, score: str, seed: int) -> Solution:
    control = score in CONTROLS
    problem = Problem.from_table(table_of(lab, "fisher" if control else score, seed))
    solver = SOLVERS.get(score if control else "certified")
    return solver(problem, lab.max_bytes(budget), seed=seed)


def _row(
    lab: Lab,
    budget: str,
    score: str,
    solutions: dict[Name, Solution],
    measured: dict[Name, Measurement],
    plans: dict[Name, NDArray[np.intp]],
) -> Row:
    names = [
        (budget, score, seed)
        for seed in range(lab.settings.seeds)
        if (budget, score, seed) in plans
    ]
    count = min(len(measured[name].kl) for name in names)
    kl = np.stack([measured[name].kl[:count] for name in names])  # [seeds, sequences]
    fisher = np.stack(
        [measured[budget, "fisher", seed].kl[:count] for seed in range(lab.settings.seeds)]
    )
    ratios = kl.mean(axis=1) / fisher.mean(axis=1)
    paired, token_error = ratio(kl.mean(axis=0), fisher.mean(axis=0))
    predicted = None
    if score in IN_NATS:
        predicted = float(np.mean([solutions[name].loss for name in names]))
    mean = float(kl.mean())
    return {
        "score": score,
        "like": LIKE.get(score, "uniform"),
        "tokens": count * LENGTH,
        "bpw": float(np.mean([lab.bpw(plans[name]) for name in names])),
        "KL": mean,
        "± seeds": standard_error(kl.mean(axis=1)) if len(names) > 1 else None,
        "± tokens": float(np.mean([measured[name].kl_stderr for name in names])),
        "KL / fisher": paired,
        "ratio ± seeds": standard_error(ratios),
        "ratio ± tokens": token_error,
        "predicted / measured": None if predicted is None else predicted / mean,
        "predicted - measured": None if predicted is None else predicted - mean,
    }


def _stderr(row: Row) -> float:
    return float(np.hypot(row["ratio ± seeds"], row["ratio ± tokens"]))


def _verdict(budget: str, others: list[Row], parts: list[Row]) -> str:
    """Whether `fisher` is best at a budget, and how it compares with its parts."""

    def against(row: Row) -> str:
        excess, stderr = row["KL / fisher"] - 1, _stderr(row)
        side = "above" if excess > 0 else "below"
        clear = "" if abs(excess) > 2 * stderr else ", within two standard errors"
        return f"`{row['score']}` {abs(excess):.1%} ± {stderr:.1%} {side} it{clear}"

    better = [row for row in others if row["KL / fisher"] < 1]
    best = "`fisher` has the least measured KL of all scores"
    if better:
        best = "`fisher` is not the best score: " + "; ".join(map(against, better))
    if all(row["KL / fisher"] >= 1 for row in parts):
        verdict = "at least as good as each of its parts"
    elif all(row["KL / fisher"] >= 1 - 2 * _stderr(row) for row in parts):
        verdict = "level with its best part"
    else:
        verdict = "not as good as its best part"
    return f"{budget}: {best}. It is {verdict} ({'; '.join(map(against, parts))})."

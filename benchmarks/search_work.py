"""Equal work: refinement next to searches that only measure, by tokens through the model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from bitplan.benchmarks.search_lab import BUDGETS, LENGTH, Lab, Part, Row, ratio, target
from bitplan.benchmarks.search_refine import (
    LINEARIZE_PASSES,
    PROFILE_PASSES,
    all_sequences,
    refined,
    truth_of,
)
from bitplan.benchmarks.search_rivals import table_of
from bitplan.models.measure import standard_error
from bitplan.reports.canvas import GREEN, INK, RED, drawing
from bitplan.search.oracle import Choice, Oracle
from bitplan.search.problem import Problem
from bitplan.search.solvers import SOLVERS

BUDGET = "3.28bpw"
STEPS = 1  # of the refinement
SHARES = (1, 2, 4, 8)  # the whole work, a half, ...
SEARCHES = ("evolutionary_scratch", "tpe")
TABLE = f"Equal work at {BUDGET}"
REFINED = "refined"
LOOKS = {  # label, colour and marker
    REFINED: ("refinement", GREEN, "o"),
    "evolutionary_scratch": ("evolutionary, from scratch", RED, "s"),
    "tpe": ("TPE, from scratch", "#3A7EBF", "^"),
}
LINES = {"uniform": (f"uniform {BUDGETS[BUDGET]}", "--"), "one shot": ("one-shot plan", ":")}


def equal_work(lab: Lab) -> Part:
    """Measure what every search has found after an eighth ... the whole of refinement's work."""
    trajectory = refined(lab, BUDGET, STEPS)
    total = trajectory.total
    found = {
        (REFINED, tokens): choice
        for tokens, choice in zip(trajectory.tokens, trajectory.choices, strict=True)
    }
    found[REFINED, total] = trajectory.choices[-1]
    table, sequences = table_of(lab, "fisher", 0), all_sequences(lab)
    oracle = truth_of(lab, sequences).oracle(sys.maxsize)
    for name in SEARCHES:
        for share in SHARES:
            if total // share >= oracle.sequences * LENGTH:  # else not one plan can be measured
                problem = Problem.from_table(table)
                choice, spent = _search(lab, name, problem, oracle, total // share)
                found[name, spent] = choice
    references = dict(zip(LINES, (lab.uniform(BUDGET), trajectory.choices[0]), strict=True))
    measured = lab.measure(found | {(name, 0): c for name, c in references.items()})
    best = measured[REFINED, total]
    rows = [_row(key, measured[key].kl, best.kl) for key in (*found, *((n, 0) for n in references))]
    last = {name: max(tokens for n, tokens in found if n == name) for name in SEARCHES}
    compared = {name: ratio(best.kl, measured[name, last[name]].kl) for name in SEARCHES}
    text = f"{BUDGET}, {total:,} tokens: KL of the refined plan / that of"
    note = (
        f"Equal work: tokens through the model, forward = 1, backward = 2. Refinement spent "
        f"{total:,}: the profile ({PROFILE_PASSES} x {lab.settings.sequences} x {LENGTH}), every "
        f"linearization ({LINEARIZE_PASSES} x as many) and every measured candidate. The searches "
        f"measure true KL on {oracle.sequences} sequences (TPE on all of them in every trial, the "
        "evolutionary search on fewer first) and know nothing but bytes. One pass of the original "
        "over the measured sequences is not counted, for any of them. Seed 0; rows are the same "
        "search stopped earlier."
    )
    return Part(
        {TABLE: rows},
        [target(f"{text} {name}", "<= 0.9", *pair) for name, pair in compared.items()],
        [note],
    )


def draw_work(rows: Sequence[Row], path: Path) -> None:
    """Draw measured KL against tokens, one line per search."""
    with drawing(path, height=5.4) as figure:
        axes = figure.add_subplot()
        for name in dict.fromkeys(row["search"] for row in rows):
            points = sorted((r for r in rows if r["search"] == name), key=lambda r: r["tokens"])
            x, y, error = ([p[key] for p in points] for key in ("tokens", "KL", "± stderr"))
            if name in LINES:
                label, style = LINES[name]
                axes.axhline(y[0], color=INK, ls=style, lw=1.2, label=label)
            else:
                label, color, marker = LOOKS[name]
                axes.errorbar(x, y, error, color=color, marker=marker, capsize=3, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens through the model (forward 1, backward 2)")
        axes.set_ylabel("measured KL on the test text, nats per token")
        axes.set_title(f"What the same work buys at {BUDGET.removesuffix('bpw')} bits per weight")
        axes.grid(visible=True)
        axes.legend()


def _search(
    lab: Lab, name: str, problem: Problem, known: Oracle, max_tokens: int
) -> tuple[Choice, int]:
    """Run a search with a number of tokens; returns its plan and the tokens it spent.

    ``known`` keeps all figures in the work folder, so a shorter search costs nothing after a
    longer one; the tokens are counted anew.
    """
    shown = 0
    with lab.reporter.bar(f"{name}, {max_tokens:,} tokens", max_tokens) as advance:

        def measure(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
            nonlocal shown
            kl = known.kl(choices, sequences)
            advance(oracle.tokens - shown)
            shown = oracle.tokens
            return kl

        oracle = Oracle(measure, known.sequences, known.length, max_tokens=max_tokens)
        solve = SOLVERS.get(name)
        choice = solve(replace(problem, oracle=oracle), lab.max_bytes(BUDGET), seed=0).choice
        advance(max_tokens - shown)
    return choice, oracle.tokens


def _row(key: tuple[str, int], kl: NDArray[np.float64], best: NDArray[np.float64]) -> Row:
    compared = ratio(kl, best)
    return {
        "search": key[0],
        "tokens": key[1],
        "KL": float(kl.mean()),
        "± stderr": standard_error(kl),
        "KL / refined": compared[0],
        "± of KL / refined": compared[1],
    }

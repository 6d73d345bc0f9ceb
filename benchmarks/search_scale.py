"""Time, memory and gap of solvers on large tables and with several limits at once."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bitplan._base.progress import Reporter
from bitplan.benchmarks.bench_solvers import BUDGETS, timed
from bitplan.benchmarks.search_lab import Part, Row, target
from bitplan.quantizers.format import Format
from bitplan.search.frontier import Frontier
from bitplan.search.limits.bops import ACTIVATION_BITS
from bitplan.search.problem import Constraint, Problem
from bitplan.search.solvers import SOLVERS
from bitplan.testing.problems import synthetic_problem

LARGE, SEVERAL, FORMATS = 100_000, 2_000, 8
TIGHTER = {"latency": 0.98, "BOPs": 0.99}  # of what the plan within the bytes alone needs


def scale(reporter: Reporter) -> Part:
    """Solve synthetic tables, each kind in a process of its own."""
    large, several = (_in_process(kind, reporter) for kind in CASES)
    worst = {key: max(row[key] for row in large) for key in ("total_s", "peak_gb")}
    seconds, gap = (max(row[key] for row in several) for key in ("highs_s", "gap"))
    both = f"{LARGE:,} x {FORMATS}: frontier and certified plan"
    limits = f"{SEVERAL:,} x {FORMATS} with two limits besides bytes"
    return Part(
        {"Large tables": large, "Several limits at once": several},
        [
            target(f"{both}, seconds", "<= 10", worst["total_s"]),
            target(f"{both}, peak memory in GB", "<= 2", worst["peak_gb"]),
            target(f"{limits}, seconds", "<= 20", seconds),
            target(f"{limits}, gap", "<= 0.001", gap),
        ],
        [
            "Scale: synthetic tables (`bench_solvers.py`). `peak_gb` is the process's resident "
            "memory, Python, imports and the table included. Limits besides bytes: a latency that "
            "follows bytes, with slower formats and noise, and bit operations; each is set below "
            "what the plan within the bytes alone needs "
            f"({', '.join(f'{name} x {part}' for name, part in TIGHTER.items())}), `used` is the "
            "share of each limit that the plan takes."
        ],
    )


def large_tables() -> Iterable[Row]:
    """Frontier and certified plans of a large table; memory at the end."""
    problem = synthetic_problem(LARGE, FORMATS, seed=0)
    certified = SOLVERS.get("certified")
    for bpw in BUDGETS:
        max_bytes = int(bpw * problem.weights / 8)
        frontier_s, frontier = timed(partial(Frontier.from_problem, problem))
        certified_s, plan = timed(partial(certified, problem, max_bytes))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        yield {
            "units": LARGE,
            "formats": FORMATS,
            "budget_bpw": bpw,
            "frontier_plans": len(frontier.bytes),
            "frontier_s": frontier_s,
            "certified_s": certified_s,
            "total_s": frontier_s + certified_s,
            "gap": plan.gap,
            "peak_gb": peak,
            "passes": frontier_s + certified_s <= 10 and peak < 2,
        }


def several_limits() -> Iterable[Row]:
    """Plans within bytes, latency and bit operations."""
    free = synthetic_problem(SEVERAL, FORMATS, seed=0)
    rows = np.arange(SEVERAL)
    for bpw in BUDGETS:
        max_bytes = int(bpw * free.weights / 8)
        start = SOLVERS.get("certified")(free, max_bytes)
        constraints = tuple(
            Constraint(name, cost, TIGHTER[name] * float(cost[rows, start.choice].sum()))
            for name, cost in _costs(free).items()
        )
        problem = replace(free, constraints=constraints)
        seconds, plan = timed(partial(SOLVERS.get("highs"), problem, max_bytes))
        used = {c.name: float(c.cost[rows, plan.choice].sum()) / c.limit for c in constraints}
        yield {
            "units": SEVERAL,
            "formats": FORMATS,
            "budget_bpw": bpw,
            "highs_s": seconds,
            "gap": plan.gap,
            "loss / loss within bytes alone": plan.loss / start.loss,
            **{
                f"{name} used": share
                for name, share in {"bytes": plan.bytes / max_bytes, **used}.items()
            },
            "passes": seconds <= 20 and plan.gap <= 1e-3,
        }


CASES: dict[str, Callable[[], Iterable[Row]]] = {
    "large": large_tables,
    "several": several_limits,
}


def _costs(problem: Problem) -> dict[str, Any]:
    """Costs [U, F]: time follows bytes, 3, 5 and 6 bits are slower; BOPs follow bits per code."""
    bits = np.array([Format.parse(name).bits for name in problem.formats])
    two, four = (problem.bytes[:, problem.formats.index(f"int{b}-g128")] for b in (2, 4))
    weights = 4 * (four - two)[:, None]  # the scales take the same: 2 bits each are left
    assert weights.sum() == problem.weights
    slower = np.where(np.isin(bits, (3, 5, 6)), 1.3, 1.0)
    noise = np.random.default_rng(1).lognormal(0, 0.1, problem.bytes.shape)
    return {
        "latency": 1e-8 * problem.bytes * slower * noise,  # ms at 100 GB/s
        "BOPs": ACTIVATION_BITS * weights * bits,
    }


def _in_process(kind: str, reporter: Reporter) -> list[Row]:
    with reporter.bar(f"Solving synthetic tables ({kind})", 1) as advance:
        command = [sys.executable, __file__, kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        advance(1)
    rows: list[Row] = json.loads(done.stdout)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=CASES)
    print(json.dumps(list(CASES[parser.parse_args().kind]())))

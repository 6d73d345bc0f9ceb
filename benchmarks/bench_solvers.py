"""Time and exactness of the frontier and the certified solver, next to CBC.

Run from the repository root: python benchmarks/bench_solvers.py
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bitplan.benchmarks.common import RESULTS, write_results
from bitplan.search.frontier import Frontier
from bitplan.search.solvers import SOLVERS
from bitplan.testing.problems import synthetic_problem

T = TypeVar("T")

BUDGETS = (3.28, 4.3)  # bits per weight
CASES = ((210, 12), (1_000, 12), (10_000, 16), (100_000, 8))  # units, formats
QUICK_CASES = ((50, 8), (210, 12))
CBC_UNITS = 10_000  # CBC is not run on larger tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tables only, for the tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    cases = QUICK_CASES if options.quick else CASES
    rows = [row for case in cases for row in measure(*case, options.seed)]
    for row in rows:
        compare_with_cbc(row, options.seed)
        print(row, file=sys.stderr)
    worst = max(row["difference"] for row in rows if row["difference"] is not None)
    write_results(
        "solvers",
        "Frontier and certified plan on synthetic tables",
        rows=rows,
        figures={"seed": options.seed, "largest_difference_from_cbc": worst},
        notes=[
            "`frontier_s` is the whole LP frontier, `certified_s` the plan at one budget with "
            "its proof (medians of 3 runs); `gap` 0 means proven optimal; `peak_mb` is the "
            "process's resident memory up to then, Python and imports included. `cbc_s` is one "
            "run of the `ilp` solver (PuLP model, CBC, zero gap) and `cbc_ratio` is "
            "`cbc_s / certified_s`; `difference` is the relative difference of the two losses.",
        ],
        out=options.out,
    )


def measure(units: int, formats: int, seed: int) -> list[dict[str, Any]]:
    """Time frontier and certified plans of one table, one row per budget."""
    problem = synthetic_problem(units, formats, seed)
    certified = SOLVERS.get("certified")
    rows = []
    for bpw in BUDGETS:
        max_bytes = int(bpw * problem.weights / 8)
        frontier_s, frontier = timed(partial(Frontier.from_problem, problem))
        certified_s, plan = timed(partial(certified, problem, max_bytes))
        rows.append(
            {
                "units": units,
                "formats": formats,
                "budget_bpw": bpw,
                "frontier_plans": len(frontier.bytes),
                "frontier_s": frontier_s,
                "certified_s": certified_s,
                "total_s": frontier_s + certified_s,
                "loss": plan.loss,
                "lp_gap": 1 - frontier.lower_bound(max_bytes) / plan.loss,
                "gap": plan.gap,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
            }
        )
    return rows


def compare_with_cbc(row: dict[str, Any], seed: int) -> None:
    """Solve a row's problem with CBC, once, and add time and difference to the row."""
    row.update(cbc_s=None, cbc_ratio=None, difference=None)
    if row["units"] > CBC_UNITS:
        return
    problem = synthetic_problem(row["units"], row["formats"], seed)
    max_bytes = int(row["budget_bpw"] * problem.weights / 8)
    row["cbc_s"], plan = timed(partial(SOLVERS.get("ilp"), problem, max_bytes), runs=1)
    row["cbc_ratio"] = row["cbc_s"] / row["certified_s"]
    row["difference"] = abs(row["loss"] - plan.loss) / plan.loss


def timed(function: Callable[[], T], runs: int = 3) -> tuple[float, T]:
    """Median wall time of some runs, in seconds, and the last result."""
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), result


if __name__ == "__main__":
    main()

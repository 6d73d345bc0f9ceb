"""The same knapsack as a 0/1 program through PuLP, for CBC or any solver a user owns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pulp

from ...quantizers.files import atomic_path
from ..hull import lower_hull
from ..problem import Problem, Solution
from . import SOLVERS

OPTIMUM = 1e5  # scaled LP optimum: CBC ignores improvements of about 1e-5
SMALLEST_OPTIMUM = 1e-6  # of the largest loss: what is below may be rounding of an optimum of 0


@SOLVERS.register("ilp")
def ilp(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Solve the knapsack to optimality with CBC; independent of bitplan's own solver.

    Args:
        problem: The table as arrays.
        max_bytes: The most bytes the plan may take.
        seed: CBC's random seed.

    Returns:
        A solution whose lower bound is its loss: CBC stops at a relative gap of zero.

    Raises:
        ValueError: If nothing fits, CBC is missing, or it ends without an optimal solution.
    """
    problem.check_feasible(max_bytes)
    program, take = _program(problem, max_bytes)
    status = pulp.LpStatus[program.solve(_cbc(seed))]
    if status != "Optimal":
        raise ValueError(
            f"CBC ended with the status {status!r} on {len(problem.units)} units. Use the "
            "'certified' solver, or write the program for another one with write_ilp."
        )
    choice = np.array(
        [max(options, key=lambda f: options[f].value() or 0.0) for options in take], dtype=np.intp
    )
    solution = problem.evaluate(choice, np.inf)
    if solution.bytes > max_bytes:
        raise ValueError(
            f"CBC's plan takes {solution.bytes - max_bytes:,} B more than the {max_bytes:,} B "
            "allowed, within its own tolerance. Use the 'certified' solver, which counts exactly."
        )
    return solution


def write_ilp(problem: Problem, max_bytes: int, path: Path) -> None:
    """Write the 0/1 program as ``.lp`` or ``.mps``, for a solver that PuLP does not know.

    Variable ``x_u_f`` is 1 when unit u takes format f.

    Raises:
        ValueError: If nothing fits, or the suffix is neither ``.lp`` nor ``.mps``.
    """
    problem.check_feasible(max_bytes)
    if path.suffix not in (".lp", ".mps"):
        raise ValueError(f"Cannot write a program to {path.name!r}: end it in .lp or .mps.")
    program, _ = _program(problem, max_bytes)
    write = program.writeLP if path.suffix == ".lp" else program.writeMPS
    with atomic_path(path) as temporary:
        write(str(temporary))


def _program(
    problem: Problem, max_bytes: int
) -> tuple[pulp.LpProblem, list[dict[int, pulp.LpVariable]]]:
    """Least loss subject to one format per unit and the budget; variables by unit and format.

    CBC's tolerances are absolute, so numbers count from each unit's least: bytes in units of
    their greatest common divisor, losses in units that make the LP optimum OPTIMUM.
    """
    allowed = problem.allowed
    smallest = problem.smallest_bytes()
    size = np.where(allowed, problem.bytes - smallest[:, None], 0)
    divisor = max(int(np.gcd.reduce(size, axis=None)), 1)
    least = problem.loss.min(axis=1, keepdims=True)
    loss = np.where(allowed, problem.loss - least, 0.0)
    lp_optimum = lower_hull(problem).relax(problem, max_bytes).bound - float(least.sum())
    typical = max(lp_optimum, SMALLEST_OPTIMUM * float(loss.max()))
    scale = OPTIMUM / typical if typical > 0 else 1.0

    program = pulp.LpProblem("bitplan", pulp.LpMinimize)
    take = [
        {int(f): pulp.LpVariable(f"x_{u}_{f}", cat=pulp.LpBinary) for f in np.flatnonzero(row)}
        for u, row in enumerate(allowed)
    ]
    entries = [(u, f, x) for u, options in enumerate(take) for f, x in options.items()]
    program += pulp.LpAffineExpression([(x, scale * float(loss[u, f])) for u, f, x in entries])
    for u, options in enumerate(take):
        program += pulp.LpAffineExpression([(x, 1) for x in options.values()]) == 1, f"one_{u}"
    used = pulp.LpAffineExpression([(x, int(size[u, f]) // divisor) for u, f, x in entries])
    program += used <= (max_bytes - int(smallest.sum())) // divisor, "bytes"
    return program, take


def _cbc(seed: int) -> pulp.LpSolver:
    """The CBC bundled with PuLP, else the one on the PATH; proves optimality, prints nothing."""
    for path in (pulp.PULP_CBC_CMD.pulp_cbc_path, None):
        solver = pulp.COIN_CMD(path=path, msg=False, gapRel=0, options=[f"randomCbcSeed {seed}"])
        if solver.available():
            return solver
    raise ValueError(
        "PuLP brought no CBC for this machine and there is none on the PATH. Install CBC "
        "(apt-get install coinor-cbc, brew install cbc) or use the 'certified' solver."
    )

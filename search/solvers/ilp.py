"""The same problem as a 0/1 program through PuLP, for CBC, HiGHS or any solver a user owns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pulp

from ..._base.files import atomic_path
from ..conflicts import explain_infeasible
from ..hull import lower_hull
from ..problem import Problem, Solution
from ..program import all_limits, excess, scaled_row, usable
from . import SOLVERS

OPTIMUM = 1e5  # scaled LP optimum: CBC ignores improvements of about 1e-5
SMALLEST_OPTIMUM = 1e-6  # of the largest loss: what is below may be rounding of an optimum of 0


@SOLVERS.register("ilp", exact=True, limits=True, mixed_rows=True)
def ilp(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
    """Solve a 0/1 program with PuLP (CBC, else HiGHS); independent of bitplan's own solver.

    Args:
        problem: The table as arrays, with its constraints.
        max_bytes: The most bytes the plan may take.
        seed: The random seed of CBC or HiGHS.

    Returns:
        A solution whose lower bound is its loss: the solver stops at a relative gap of zero.

    Raises:
        ValueError: If nothing fits, no solver is installed, or it ends without an optimal
            solution.

    References:
        Mitchell, O'Sullivan and Dunning (2011), "PuLP: a linear programming toolkit for Python";
        Yao et al. (2021), "HAWQ-V3: dyadic neural network quantization", ICML: bits by ILP.

    Example:
        >>> from bitplan.testing import toy_problem
        >>> plan = ilp(toy_problem(), max_bytes=112)
        >>> plan.choice.tolist(), plan.bytes, plan.loss, plan.gap
        ([1, 0, 1, 1], 104, 0.17578125, 0.0)
    """
    problem.check_feasible(max_bytes)
    program, take = _program(problem, max_bytes)
    solver = _installed_solver(seed)
    try:
        status = pulp.LpStatus[program.solve(solver)]
    except pulp.PulpSolverError:  # CBC writes no answer when it sees at once that there is none
        status = "Infeasible"
    if status == "Infeasible":
        why = explain_infeasible(problem, max_bytes)
        raise ValueError(f"{solver.name} finds no plan: {why}")
    if status != "Optimal":
        raise ValueError(
            f"{solver.name} ended with the status {status!r} on {len(problem.units)} units. Use "
            "the 'certified' solver, or write the program for another one with write_ilp."
        )
    choice = np.array(
        [max(options, key=lambda f: options[f].value() or 0.0) for options in take], dtype=np.intp
    )
    for limit in all_limits(problem, max_bytes):
        over = excess(limit, choice)
        if over:
            raise ValueError(
                f"{solver.name}'s plan exceeds {limit.name} <= {limit.limit:,} {limit.symbol} by "
                f"{over:,.6g}, within its own tolerance. Use the 'certified' solver, which counts "
                "exactly."
            )
    return problem.evaluate(choice, np.inf)


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
    """Least loss subject to one format per unit and all limits; variables by unit and format.

    CBC's tolerances are absolute, so numbers count from each unit's least: bytes in units of
    their greatest common divisor, losses in units that make the LP optimum OPTIMUM.
    """
    allowed = usable(problem)
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
    for i, constraint in enumerate(problem.constraints):
        row, room, _ = scaled_row(constraint, allowed)
        terms = pulp.LpAffineExpression([(x, float(row[u, f])) for u, f, x in entries])
        program += terms <= room, f"limit_{i}"
    return program, take


def _installed_solver(seed: int) -> pulp.LpSolver:
    """CBC, bundled with PuLP or on the PATH, else HiGHS; proves optimality, prints nothing.

    CBC's preprocessing of several limits can lose the optimum, and saves no time.
    """
    options = [f"randomCbcSeed {seed}", "preprocess off"]
    solvers = (
        pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, msg=False, gapRel=0, options=options),
        pulp.COIN_CMD(msg=False, gapRel=0, options=options),
        pulp.HiGHS(msg=False, gapRel=0, random_seed=seed),
    )
    for solver in solvers:
        if solver.available():
            return solver
    raise ValueError(
        "PuLP brought no CBC for this machine, there is none on the PATH, and highspy is not "
        "installed. Install CBC (apt-get install coinor-cbc, brew install cbc) or highspy (pip "
        "install highspy), or use the 'certified' solver."
    )

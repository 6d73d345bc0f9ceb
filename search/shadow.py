"""Shadow prices: what one more unit of every limit would buy at the optimum."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .hull import lower_hull
from .problem import Problem
from .program import OPTIMUM, Program


class ShadowPrices(NamedTuple):
    """The multipliers of the LP relaxation, none negative.

    Attributes:
        per_byte: Predicted KL that one more byte removes, nats per token; 0 where the budget does
            not bind.
        per_limit: The same for one more unit of each further constraint, in their order.
    """

    per_byte: float
    per_limit: tuple[float, ...] = ()


def shadow_prices(problem: Problem, max_bytes: int) -> ShadowPrices:
    r"""The multipliers at a budget of ``max_bytes`` bytes and the problem's own constraints.

    At the optimum every unit takes the option with the least ``loss + per_byte * bytes +
    sum_c per_limit_c * cost_c``, but for the few that the relaxation splits.

    For bytes alone the multiplier is the slope of the first hull step that does not fit.  With
    further constraints it comes from HiGHS's dual simplex.

    Args:
        problem: Units, bytes, prices and constraints.
        max_bytes: The budget.

    Raises:
        ValueError: If nothing fits within the limits.

    References:
        Everett (1963), "Generalized Lagrange multiplier method for solving problems of optimum
        allocation of resources", Operations Research.
    """
    problem.check_feasible(max_bytes)
    if not problem.constraints:
        return ShadowPrices(lower_hull(problem).relax(problem, max_bytes).slope)
    from scipy.optimize import linprog  # slow to load, and only several limits need it
    from scipy.sparse import csr_array

    program = Program.build(problem, max_bytes)
    least = np.where(program.options, problem.loss, np.inf).min(axis=1)
    above = (problem.loss - least[:, None])[program.options]
    scale = OPTIMUM / (float(above.max()) or 1.0)
    count, unit = len(above), np.nonzero(program.options)[0]
    result = linprog(
        above * scale,
        A_ub=csr_array(program.rows),
        b_ub=program.room,
        A_eq=csr_array((np.ones(count), (unit, np.arange(count)))),
        b_eq=np.ones(len(problem.units)),
        method="highs-ds",
    )
    if result.x is None:
        raise ValueError("No plan is within all limits, so none of them has a price. Loosen one.")
    duals: NDArray[np.float64] = -result.ineqlin.marginals / scale / program.scale
    per_byte, *per_limit = np.maximum(duals, 0.0).tolist()
    return ShadowPrices(per_byte, tuple(per_limit))

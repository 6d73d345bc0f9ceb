"""Why no choice is within all limits: which of them conflict, and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .problem import Constraint, Problem
from .program import Program, excess, used

GAP = 1e-3  # relative; how close to the least possible the suggested limits are


def feasible(problem: Problem, max_bytes: int) -> bool:
    """Whether any choice keeps all limits."""
    program = Program.build(problem, max_bytes)
    return _feasible(program, range(len(program.limits)))


def explain_infeasible(problem: Problem, max_bytes: int) -> str:
    """Name the limits that conflict, what each could be, and which to raise to what.

    A deletion filter leaves an irreducible set: without any one of its limits the others can
    hold.  For each of them, the least it can be beside *all* other limits is a limit that works
    on its own.  If there is none, because several sets conflict, an elastic program with a slack
    variable per limit finds the raise of several with the least sum of relative excesses.

    Args:
        problem: The problem with its constraints.
        max_bytes: The most bytes the plan may take.

    Returns:
        Sentences to show; that all limits can hold if they can.

    Raises:
        ValueError: If a constraint does not fit the problem.

    References:
        Chinneck and Dravnieks (1991), "Locating minimal infeasible constraint sets in linear
        programs", ORSA Journal on Computing: deletion filter and elastic programs.
    """
    program = Program.build(problem, max_bytes)
    everything = list(range(len(program.limits)))
    if _feasible(program, everything):
        return "All limits can hold together."
    conflict = _irreducible(program)
    least = {i: _least(program, i, [j for j in everything if j != i]) for i in conflict}
    alone = {i: value for i, value in least.items() if value is not None}
    stated = [_statement(program.limits[i]) for i in conflict]
    return (
        f"{_join(stated, 'and')} cannot {_together(len(stated))}hold: "
        f"{_findings(program, conflict)}. {_advice(program, alone)}"
    )


def _feasible(program: Program, keep: Sequence[int]) -> bool:
    return program.minimize(np.zeros(program.options.shape), keep=keep) is not None


def _irreducible(program: Program) -> list[int]:
    """Drop every limit that the conflict does not need."""
    conflict = list(range(len(program.limits)))
    for i in reversed(range(len(program.limits))):
        rest = [j for j in conflict if j != i]
        if rest and not _feasible(program, rest):
            conflict = rest
    return conflict


def _least(program: Program, index: int, keep: Sequence[int]) -> float | None:
    """The least that limit ``index`` can be when those in ``keep`` hold; None if they cannot."""
    limit = program.limits[index]
    found = program.minimize(limit.cost, keep=keep, max_gap=GAP)
    return None if found is None else used(limit, found.choice)


def _findings(program: Program, conflict: Sequence[int]) -> str:
    """What the other limits of the conflict ask of each."""
    found = []
    for i in conflict:
        others = [j for j in conflict if j != i]
        value = _least(program, i, others)
        if value is not None:
            beside = _join([_statement(program.limits[j]) for j in others], "and")
            needs = f"{program.limits[i].name} >= {_amount(program.limits[i], value)}"
            found.append(f"{beside or 'every choice'} needs {needs}")
    return "; ".join(found)


def _advice(program: Program, alone: dict[int, float]) -> str:
    if alone:
        raises = [_raise(program.limits[i], value) for i, value in alone.items()]
        return f"Raise {_join(raises, 'or')}."
    choice = program.relax_limits()
    over = [limit for limit in program.limits if excess(limit, choice)]
    raises = [_raise(limit, used(limit, choice)) for limit in over]
    return f"There are further conflicts; raise {_join(raises, 'and')} together."


def _statement(limit: Constraint) -> str:
    shown = f"{limit.limit:,}" if isinstance(limit.limit, int) else f"{limit.limit:,.10g}"
    return f"{limit.name} <= {shown} {limit.symbol}".rstrip()


def _raise(limit: Constraint, value: float) -> str:
    amount = _amount(limit, value)
    if not limit.option:
        return f"{limit.name} to {amount}"
    figure = amount.removesuffix(limit.symbol).strip().replace(",", "")
    unit = "B" if limit.symbol == "B" else ""  # a budget has a unit, other options have one each
    return f"{limit.name} to {amount} ({limit.option} {figure}{unit})"


def _amount(limit: Constraint, value: float) -> str:
    """``value`` in the limit's unit; rounded up, so that the figure works as a limit."""
    if isinstance(limit.limit, int):
        return f"{math.ceil(value):,} {limit.symbol}".rstrip()
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 3) if value else 1.0
    digits = max(0, -round(math.log10(step)))
    up = math.ceil(value / step) * step
    return f"{up:,.{digits}f} {limit.symbol}".rstrip()


def _join(parts: Sequence[str], word: str) -> str:
    return f" {word} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _together(count: int) -> str:
    return {1: "", 2: "both "}.get(count, "all ")

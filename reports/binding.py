"""What holds a plan back: every limit, how much of it is used, and what a little more would buy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..search.budget import format_bytes
from ..search.limits import build_problem, refused_options
from ..search.problem import Problem
from ..search.program import used
from ..search.shadow import ShadowPrices, shadow_prices
from .run import RunData
from .words import number


class Economy(NamedTuple):
    """What the budget makes worth its bytes.

    Attributes:
        problem: The weights' problem with the limits of the run.
        prices: Multipliers of the bytes and of every further constraint.
        note: Why a constraint is missing here; empty if none is.
    """

    problem: Problem
    prices: ShadowPrices
    note: str

    def charges(self) -> NDArray[np.float64]:
        """float64 [U, F], what an option pays for the limits it uses up, nats per token."""
        total = self.prices.per_byte * self.problem.bytes.astype(np.float64)
        for constraint, price in zip(self.problem.constraints, self.prices.per_limit, strict=True):
            total = total + price * np.where(np.isfinite(constraint.cost), constraint.cost, 0.0)
        return total


def economy(run: RunData) -> Economy:
    """The problem a run solved for its weights, and the shadow prices at its budget.

    Latencies are read again; where that is impossible their limit is left out, with a note.
    """
    limits, note = run.limits, ""
    try:
        problem = build_problem(run.table, limits)
    except (ValueError, OSError) as error:
        limits = replace(limits, latency=None, max_ms=None)
        note = f"The limit on latency is left out: {error}"
        problem = build_problem(run.table, limits)
    room = weights_budget(run)
    try:
        return Economy(problem, shadow_prices(problem, room), note)
    except ValueError as error:  # a plan from elsewhere may break the limits
        bare = replace(problem, constraints=())
        least = int(bare.smallest_bytes().sum())
        return Economy(bare, shadow_prices(bare, max(room, least)), f"{note} {error}".strip())


def weights_budget(run: RunData) -> int:
    """Bytes that the weights may take: what a planned KV cache leaves of the budget."""
    cache = run.plan.kv_cache
    return run.plan.budget.bytes - (cache.bytes if cache else 0)


class LimitRow(NamedTuple):
    """One limit in words.

    Attributes:
        name: What is limited, or the option that limits it.
        used: How much the plan uses, or how many units it is about.
        limit: The most, in the same unit; empty for a limit on formats.
        share: ``used / limit``; NaN for a limit on formats.
        binds: Whether the plan would be better without it.
        effect: What loosening it would buy.
    """

    name: str
    used: str
    limit: str
    share: float
    binds: bool
    effect: str


def limit_rows(run: RunData, found: Economy, size: tuple[str, float]) -> list[LimitRow]:
    """Every limit of a run: bytes, a quality target, further constraints, limits on formats.

    Args:
        run: The run.
        found: Its :func:`economy`.
        size: The unit that sizes read well in, and its megabytes.
    """
    return [*_amounts(run, found, size), *_format_limits(run, found)]


def _amounts(run: RunData, found: Economy, size: tuple[str, float]) -> Iterator[LimitRow]:
    plan, unit, step = run.plan, size[0], 1e6 * size[1]
    price = found.prices.per_byte * step
    target = plan.budget.is_target
    worth = f"1 {unit} more would lower the predicted KL by about {number(price)}"
    if target:
        name, share = f"smallest size ({plan.budget.text})", 1.0
        worth = f"the last {unit} bought a predicted KL of about {number(price)}"
    else:
        name = f"{'memory' if plan.kv_cache else 'size'} ({plan.budget.text})"
        share = plan.total_bytes / plan.budget.bytes
    yield LimitRow(
        name,
        format_bytes(plan.total_bytes),
        format_bytes(plan.budget.bytes),
        share,
        price > 0,
        worth if price > 0 else "no format would make the predicted KL lower",
    )
    if target and plan.measured is not None and run.settings is not None:
        yield from _target(run)
    if run.formats != run.table.formats:  # a format without a price has no cost either
        return
    for constraint, worth_one in zip(
        found.problem.constraints, found.prices.per_limit, strict=True
    ):
        total, symbol = used(constraint, run.choice), f" {constraint.symbol}".rstrip()
        effect = "does not bind: another limit is reached first"
        if worth_one > 0:
            gain = number(worth_one * constraint.limit / 100)
            effect = f"1 % more would lower the predicted KL by about {gain}"
        yield LimitRow(
            constraint.name,
            f"{_count(total)}{symbol}",
            f"{_count(constraint.limit)}{symbol}",
            total / constraint.limit if constraint.limit else 1.0,
            worth_one > 0,
            effect,
        )


def _target(run: RunData) -> Iterator[LimitRow]:
    settings, measured = run.settings, run.plan.measured
    assert settings is not None
    assert measured is not None
    for name, value, limit in (
        ("measured KL", measured.kl, settings.max_kl),
        ("measured perplexity", measured.ppl, settings.max_ppl),
    ):
        if value is not None and limit is not None:
            effect = "a higher target would allow a smaller plan"
            share = value / limit
            yield LimitRow(name, number(value), number(limit), share, True, effect)


def _format_limits(run: RunData, found: Economy) -> Iterator[LimitRow]:
    """Limits on formats: they bind where an option they refuse would be the best one."""
    priced = np.where(np.isnan(run.table.kl), np.inf, run.table.kl) + found.charges()
    rows = np.arange(len(run.table.units))
    free = priced.argmin(axis=1)
    loss = np.where(found.problem.allowed, priced, np.inf).min(axis=1) - priced[rows, free]
    for text, mask in refused_options(run.table, run.limits):
        touched = mask.any(axis=1)
        hit = mask[rows, free]
        cost = float(loss[hit].sum())
        binds = bool(hit.any()) and cost > 0
        effect = "does not bind: no unit would choose what it refuses"
        if binds:
            effect = (
                f"binds for {hit.sum():,}; without it the predicted KL would be up to "
                f"{number(cost)} lower"
            )
        yield LimitRow(text, _units(int(touched.sum())), "", float("nan"), binds, effect)


def _units(count: int) -> str:
    return f"{count:,} unit{'' if count == 1 else 's'}"


def _count(value: float) -> str:
    """A number with the letter of its power of a thousand: ``7.34 M``."""
    for letter, power in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= power:
            return f"{number(value / power)} {letter}"
    return number(value)

"""How sure a plan is: the same search on resampled calibration sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from .._base.records import Record, Strict
from .hull import lower_hull
from .problem import Problem
from .solvers.certified import certified

THRESHOLD = 0.9  # a unit with less agreement is undecided
ONE_SIDED_95 = 1.645  # standard errors that a margin needs to be settled
MOST_SEQUENCES = 100  # times the sequences there are: beyond that two formats are a tie
EXACT_UNITS = 2_000  # up to here every resample is solved exactly
NAMED = 8  # undecided units that a summary names
BLOCK_SCORES = 4_000_000  # scores squared at a time

# weights [N] of the sequences, 1 each as profiled -> prices [U, F], nats per token
Reprice = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Confidence:
    """What resampling the calibration sequences does to a plan.

    Attributes:
        units: Names of the U units.
        plan: The plan's format of every unit.
        agreement: float64 [U], share of the resamples in which the unit gets that format.
        runner_up: The format it gets most often otherwise, or would change to first; empty for a
            unit that may take only one.
        more_sequences: float64 [U], about how many more calibration sequences tell the two apart
            with 95 % confidence; 0 if those there are do, inf if it is a tie.
        optimism: The winner's curse: how much the plan's predicted KL is too low, on average,
            because the solver picks prices that err low; nats per token.
        sequences: Calibration sequences N.
        resamples: Resamples B.
        seed: Seed of the resamples.
    """

    units: tuple[str, ...]
    plan: tuple[str, ...]
    agreement: NDArray[np.float64]
    runner_up: tuple[str, ...]
    more_sequences: NDArray[np.float64]
    optimism: float
    sequences: int
    resamples: int
    seed: int

    @property
    def undecided(self) -> list[str]:
        """Names of the units whose agreement is below THRESHOLD, least agreement first."""
        return [self.units[u] for u in self._undecided()]

    def summary(self, drawn: str = "sequences") -> list[str]:
        """Lines for the terminal; at most NAMED units are named.

        Args:
            drawn: What to call the calibration samples.
        """
        undecided, total = self._undecided(), len(self.units)
        resamples = f"{self.resamples} bootstrap resamples"
        if not len(undecided):
            share = f"at least {THRESHOLD:.0%}"
            return [f"All {total} units keep their format in {share} of {resamples}."]
        lines = [
            f"{len(undecided)} of {total} units are undecided (their format changes in more than "
            f"{1 - THRESHOLD:.0%} of {resamples}):"
        ]
        lines += [f"  {self._describe(u, drawn)}" for u in undecided[:NAMED]]
        if len(undecided) > NAMED:
            lines.append(f"  and {len(undecided) - NAMED} more")
        return lines

    def save(self, path: Path) -> None:
        """Write as JSON, atomically, one entry per unit."""
        columns = zip(self.plan, self.agreement, self.runner_up, self.more_sequences, strict=True)
        entries = [
            _Unit(
                format=chosen,
                agreement=float(share),
                runner_up=other or None,
                more_sequences=float(more) if math.isfinite(more) else "tie",
            )
            for chosen, share, other, more in columns
        ]
        _File(
            sequences=self.sequences,
            resamples=self.resamples,
            seed=self.seed,
            optimism=self.optimism,
            threshold=THRESHOLD,
            undecided=self.undecided,
            units=dict(zip(self.units, entries, strict=True)),
        ).write(path)

    @classmethod
    def load(cls, path: Path) -> Confidence:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is missing, is not JSON, or breaks the schema.
        """
        file = _File.read(path)
        entries = file.units.values()
        return cls(
            units=tuple(file.units),
            plan=tuple(entry.format for entry in entries),
            agreement=np.array([entry.agreement for entry in entries]),
            runner_up=tuple(entry.runner_up or "" for entry in entries),
            more_sequences=np.array(
                [math.inf if e.more_sequences == "tie" else e.more_sequences for e in entries]
            ),
            optimism=file.optimism,
            sequences=file.sequences,
            resamples=file.resamples,
            seed=file.seed,
        )

    def _undecided(self) -> NDArray[np.intp]:
        order = np.argsort(self.agreement, kind="stable")
        return order[: int((self.agreement < THRESHOLD).sum())]

    def _describe(self, unit: int, drawn: str) -> str:
        more = self.more_sequences[unit]
        need = f"about {more:,.0f} more {drawn}"
        if math.isinf(more):
            need = f"a tie: more {drawn} will not settle it"
        elif more == 0:
            need = f"more {drawn} would not change that"
        return (
            f"{self.units[unit]} {self.plan[unit]} {self.agreement[unit]:.0%} "
            f"(else {self.runner_up[unit]}; {need})"
        )


def bootstrap(
    problem: Problem,
    max_bytes: int,
    choice: NDArray[np.intp],
    *,
    reprice: Reprice | None = None,
    sequences: int | None = None,
    resamples: int = 200,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Confidence:
    r"""Resample the calibration sequences, price and solve again, compare with the plan.

    Each resample draws N of the N sequences with replacement, as multinomial weights, and solves
    again: exactly for up to EXACT_UNITS units, beyond by the LP plan within the budget, which is
    optimal but for one unit.  A unit's agreement is the share of resamples that give it the
    plan's format.

    A unit's margin is what its runner-up would cost more at the multiplier :math:`\lambda` of the
    byte constraint, ``D = (kl + lambda * bytes)_runner - (kl + lambda * bytes)_plan``.  With
    ``sigma`` its standard deviation per sequence (sqrt(N) times that over the resamples, lambda's
    own changes included), ``(1.645 sigma / D)^2`` sequences settle it.

    The optimism is the mean over resamples of how much better the resample's plan looks at the
    prices it was made from than at the original ones, less the same for the original plan, whose
    expectation is 0 and which removes most of the noise.  The original prices have noise of their
    own, which hides ties from the resamples, so the estimate errs low: by nothing to a quarter.

    Args:
        problem: Units, bytes, prices and, without ``reprice``, scores.
        max_bytes: The budget.
        choice: intp [U], the plan.
        reprice: Prices from sequence weights [N], which sum to N; equal weights must give
            ``problem.loss``.  By default the weighted mean of ``problem.scores**2``.
        sequences: The N that ``reprice`` weighs; by default that of ``problem.scores``.
        resamples: Resamples B; a share errs by up to 0.5 / sqrt(B).
        seed: Seed of the resamples.
        advance: Told about every finished resample.

    Raises:
        ValueError: If there are fewer than two sequences or resamples, the plan takes a format
            that is not allowed, the budget is too small, there are further constraints, or
            ``reprice`` does not give the problem's prices.

    References:
        Efron (1979), "Bootstrap methods: another look at the jackknife"; for the optimism: Efron
        (1983), "Estimating the error rate of a prediction rule", JASA.
    """
    problem.check_feasible(max_bytes)
    count = _checked_sequences(problem, choice, sequences, resamples)
    price = reprice or _mean_square(problem)
    _check_prices(problem, price(np.ones(count)))

    random = np.random.default_rng(seed)
    rows, allowed = np.arange(len(choice)), problem.allowed
    size = problem.bytes - problem.bytes[rows, choice][:, None]
    taken = np.zeros(problem.loss.shape, dtype=np.int64)
    mean, squares = np.zeros(problem.loss.shape), np.zeros(problem.loss.shape)
    margin = _margin(problem, choice, size, lower_hull(problem).relax(problem, max_bytes).slope)
    optimism = 0.0
    exact = len(choice) <= EXACT_UNITS
    for _ in range(resamples):
        weights = random.multinomial(count, np.full(count, 1 / count)).astype(np.float64)
        drawn = replace(problem, loss=np.where(allowed, price(weights), np.inf), scores=None)
        relaxed = lower_hull(drawn).relax(drawn, max_bytes)
        again = certified(drawn, max_bytes).choice if exact else relaxed.choice
        taken[rows, again] += 1
        change = _margin(drawn, choice, size, relaxed.slope) - margin
        mean += change
        squares += change**2
        error = problem.loss[rows, relaxed.choice] - drawn.loss[rows, relaxed.choice]
        fixed = problem.loss[rows, choice] - drawn.loss[rows, choice]
        optimism += float((error - fixed).sum())
        advance(1)

    other = allowed.copy()
    other[rows, choice] = False
    often = np.where(other, taken, -1)
    ranked = np.where(often == often.max(axis=1, keepdims=True), margin, np.inf)
    runner = np.where(other, ranked, np.inf).argmin(axis=1)
    variance = (squares - mean**2 / resamples) / (resamples - 1)
    deviation = np.sqrt(count * np.maximum(variance, 0.0))[rows, runner]
    has_other = other.sum(axis=1) > 0
    more = np.where(has_other, more_sequences(margin[rows, runner], deviation, count), 0.0)
    return Confidence(
        units=problem.units,
        plan=tuple(problem.formats[f] for f in choice),
        agreement=taken[rows, choice] / resamples,
        runner_up=tuple(
            problem.formats[f] if exists else ""
            for f, exists in zip(runner, has_other, strict=True)
        ),
        more_sequences=more,
        optimism=optimism / resamples,
        sequences=count,
        resamples=resamples,
        seed=seed,
    )


def more_sequences(
    margin: NDArray[np.float64], deviation: NDArray[np.float64], sequences: int
) -> NDArray[np.float64]:
    """Sequences beyond those there are until a margin is 1.645 standard errors from zero.

    Args:
        margin: float64 [U], mean margins, nats per token.
        deviation: float64 [U], their standard deviations per sequence.
        sequences: Sequences N there are.

    Returns:
        float64 [U], whole numbers; inf beyond MOST_SEQUENCES times N.
    """
    needed = np.full(margin.shape, np.inf)
    np.divide(ONE_SIDED_95 * deviation, np.abs(margin), out=needed, where=margin != 0)
    needed = needed**2
    more: NDArray[np.float64] = np.maximum(np.ceil(needed - sequences), 0.0)
    return np.where(needed > MOST_SEQUENCES * sequences, np.inf, more)


def _margin(
    problem: Problem, choice: NDArray[np.intp], size: NDArray[np.int64], slope: float
) -> NDArray[np.float64]:
    """What every option costs more than the plan's, bytes at ``slope``; 0 if not allowed."""
    chosen = problem.loss[np.arange(len(choice)), choice][:, None]
    loss = np.where(problem.allowed, problem.loss, chosen)
    return np.where(problem.allowed, loss - chosen + slope * size, 0.0)


def _mean_square(problem: Problem) -> Reprice:
    """Prices as the weighted mean of squared scores, in blocks of units to bound memory."""
    scores = problem.scores
    assert scores is not None
    count, units, formats = scores.shape
    step = max(1, BLOCK_SCORES // (count * formats))

    def price(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        share = weights / weights.sum()
        prices = np.empty((units, formats))
        for first in range(0, units, step):
            block = np.square(scores[:, first : first + step], dtype=np.float64)
            prices[first : first + step] = (share @ block.reshape(count, -1)).reshape(-1, formats)
        return prices

    return price


def _checked_sequences(
    problem: Problem, choice: NDArray[np.intp], sequences: int | None, resamples: int
) -> int:
    if problem.constraints:
        names = ", ".join(constraint.name for constraint in problem.constraints)
        raise ValueError(
            f"The bootstrap solves for bytes alone, but {names} is limited too. Add each "
            "constraint's cost times its multiplier to the losses, in `reprice` as well, and "
            "leave the constraints out."
        )
    if not problem.allowed[np.arange(len(choice)), choice].all():
        unit = int((~problem.allowed[np.arange(len(choice)), choice]).argmax())
        raise ValueError(
            f"The plan gives unit {problem.units[unit]!r} the format "
            f"{problem.formats[int(choice[unit])]!r}, which it may not take. Use the problem the "
            "plan was made for."
        )
    if sequences is None:
        if problem.scores is None:
            raise ValueError(
                "The profile has no per-sequence scores to resample: its metric makes none, or it "
                "had one sequence. Profile with --metric fisher and more --sequences."
            )
        sequences = len(problem.scores)
    if sequences < 2 or resamples < 2:
        raise ValueError(
            f"{resamples} resamples of {sequences} sequences say nothing about noise. Take at "
            "least two of each; 200 resamples are usual."
        )
    return sequences


def _check_prices(problem: Problem, prices: NDArray[np.float64]) -> None:
    """Raise unless equal weights give the prices that the plan was made from."""
    allowed = problem.allowed
    noise = 1e-6 * float(np.abs(problem.loss[allowed]).max())  # signed prices cross zero
    if not np.allclose(prices[allowed], problem.loss[allowed], rtol=1e-3, atol=noise):
        wrong = np.where(allowed, np.abs(prices - np.where(allowed, problem.loss, 0.0)), 0.0)
        u, f = (int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
        raise ValueError(
            f"With equal weights unit {problem.units[u]!r} in {problem.formats[f]!r} is priced "
            f"{prices[u, f]:.6g} nats per token, in the problem {problem.loss[u, f]:.6g}. Pass the "
            "`reprice` that made the problem's prices."
        )


class _Unit(Strict):
    format: str
    agreement: float
    runner_up: str | None
    more_sequences: float | Literal["tie"]


class _File(Record):
    """The schema of confidence.json."""

    KIND: ClassVar[str] = "confidence"
    MAKE: ClassVar[str] = "`bitplan search MODEL --bootstrap 200` makes one."
    MEND: ClassVar[str] = "Delete it and search again with --bootstrap 200."

    schema_version: Literal[1] = Field(default=1, alias="schema")
    sequences: int
    resamples: int
    seed: int
    optimism: float
    threshold: float
    undecided: list[str]
    units: dict[str, _Unit]

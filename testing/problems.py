"""Small problems for solvers: a toy to read, synthetic tables of any size, and brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..quantizers.format import Format
from ..search.oracle import Choice, Oracle
from ..search.problem import Problem

TOY_BITS = np.array([2, 4, 8])
TOY_WEIGHTS = np.array([32, 96, 32, 96])
FORMATS = (
    "int2-g128",
    "int2-g64-asym",
    "int3-g128",
    "int3-g64-asym",
    "int4-g128",
    "int4-g64-asym",
    "int6-g64-asym",
    "int8-g64-asym",
    "int4-g32-asym",
    "int5-g128",
    "int5-g64-asym",
    "int6-g128",
    "int8-g128",
    "int8-gc",
    "int3-g32-asym",
    "bf16",
)


def toy_problem(oracle_plans: int = 0) -> Problem:
    """Two layers of an attention and an MLP matrix, 256 weights, at 2, 4 and 8 bits.

    Losses are ``sensitivity * 4^-bits``, the smallest plan takes 64 B and the largest 256 B.  It
    has all that a solver may ask for, and as quality target (``max_loss``) 0.25 nats.

    Args:
        oracle_plans: So many plans may be measured (:func:`toy_oracle`); 0 for no oracle.

    Example:
        >>> problem = toy_problem()
        >>> problem.units
        ('layers.0.attn', 'layers.0.mlp', 'layers.1.attn', 'layers.1.mlp')
        >>> problem.bytes.tolist()
        [[8, 16, 32], [24, 48, 96], [8, 16, 32], [24, 48, 96]]
        >>> problem.loss[:, 0].tolist()  # nats, at 2 bits
        [0.5, 0.125, 0.0625, 0.25]
    """
    kinds = ("attn", "mlp")
    names = tuple(f"layers.{layer}.{kind}" for layer in range(2) for kind in kinds)
    sensitivity = np.array([8.0, 2.0, 1.0, 4.0])
    bare = Problem(
        names,
        tuple(f"int{bits}" for bits in TOY_BITS),
        TOY_WEIGHTS[:, None] * TOY_BITS // 8,
        sensitivity[:, None] * 4.0**-TOY_BITS,
        weights=int(TOY_WEIGHTS.sum()),
    )
    return replace(
        equipped(bare),
        unit_weights=TOY_WEIGHTS,
        kinds=kinds * 2,
        layers=(0, 0, 1, 1),
        max_loss=0.25,
        oracle=toy_oracle(bare, oracle_plans) if oracle_plans else None,
    )


def synthetic_problem(units: int, formats: int, seed: int) -> Problem:
    """A table like those of language models, with every unit of another shape.

    Bytes are those of real formats for matrices of 256..8192 rows and columns.  The loss falls
    as 2^(-1.9 bits per weight); units differ by a log-normal factor (sigma 1.5) and every entry
    by another (sigma 0.15), so that the best format is not the same everywhere.

    Args:
        units: Number of units.
        formats: Number of formats, at most 16.
        seed: Draws shapes and losses.
    """
    generator = np.random.default_rng(seed)
    shapes = 64 * generator.integers(4, 129, (units, 2))
    candidates = [Format.parse(name) for name in FORMATS[:formats]]
    size = np.array(
        [[fmt.stored_bytes((int(r), int(c))) for fmt in candidates] for r, c in shapes],
        dtype=np.int64,
    )
    weights = shapes.prod(axis=1)
    bpw = 8 * size / weights[:, None]
    level = generator.lognormal(0, 1.5, units) * weights / weights.sum()
    loss = 40 * level[:, None] * 2.0 ** (-1.9 * bpw) * generator.lognormal(0, 0.15, bpw.shape)
    names = tuple(f"unit{u}" for u in range(units))
    return Problem(names, FORMATS[:formats], size, loss, int(weights.sum()))


def equipped(problem: Problem) -> Problem:
    """With all that a solver may ask for: weights, kinds, layers, scores and a modest target.

    Every plan reaches the target: a solver that looks for the smallest plan finds the smallest.
    """
    count = len(problem.units)
    finite = np.where(problem.allowed, problem.loss, 0.0)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (8, count, 1))
    return replace(
        problem,
        unit_weights=np.maximum(problem.bytes.max(axis=1), 1),
        kinds=tuple("ab"[u % 2] for u in range(count)),
        layers=tuple(u // 2 for u in range(count)),
        scores=(signs * np.sqrt(np.maximum(finite, 0.0))).astype(np.float32),
        max_loss=float(finite.max(axis=1).sum()),
    )


def toy_oracle(problem: Problem, plans: int, sequences: int = 8, length: int = 4) -> Oracle:
    """An oracle that contradicts the table: the two halves of the units have changed places.

    Args:
        problem: The table; a unit's measured KL is the loss of the unit half of them further on.
        plans: It may be asked for so many plans on all sequences, which differ by up to a tenth.
        sequences: Number of sequences.
        length: Tokens per sequence.
    """
    count = len(problem.units)
    loss = np.roll(problem.loss, count // 2, axis=0)
    level = np.random.default_rng(0).uniform(0.9, 1.1, sequences)

    def measure(choices: Sequence[Choice], asked: range) -> NDArray[np.float64]:
        total = np.array([loss[np.arange(count), choice].sum() for choice in choices])
        found: NDArray[np.float64] = total[:, None] * level[asked]
        return found

    return Oracle(measure, sequences, length, max_tokens=plans * sequences * length)


def budgets(problem: Problem, count: int) -> list[int]:
    """From the smallest uniform plan (which every solver can reach) to above the largest."""
    uniform = [problem.uniform_choice(f) for f in range(len(problem.formats))]
    sizes = [problem.evaluate(c, np.inf).bytes for c in uniform if c is not None]
    most = int(problem.bytes.max(axis=1).sum())
    return [int(b) for b in np.linspace(min(sizes), most + 1, count)]


def brute_force(problem: Problem, max_bytes: int) -> float:
    """The least loss of all plans within ``max_bytes``, by trying every one; nats."""
    choices = itertools.product(*(np.flatnonzero(row) for row in problem.allowed))
    plans = (problem.evaluate(np.array(choice), np.inf) for choice in choices)
    return min(plan.loss for plan in plans if plan.bytes <= max_bytes)

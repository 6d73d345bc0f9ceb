"""What a search allows is what an export accepts, for every runtime and random tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.exporters.checks import snap, violations
from bitplan.models.units import UnitInfo
from bitplan.quantizers import runtimes as rules
from bitplan.quantizers.format import Format
from bitplan.quantizers.runtimes import Rules, byte_count
from bitplan.search.limits import Limits, build_problem
from bitplan.search.solvers import SOLVERS
from bitplan.sensitivity.table import SensitivityTable, stored_bytes
from bitplan.tests.fakes import fake_table
from bitplan.tests.fakes import transformer_units as units_of

ODD = ("int1-g64", "int3-g64-asym", "int7-gc", "int2-gt-asym", "q2_k", "int4-g256", "fp16")
SEEDS = st.integers(0, 2**32 - 1)


def random_units(generator: np.random.Generator) -> tuple[UnitInfo, ...]:
    """Two layers with an embedding; some inputs have a width that few formats fit.

    Matrices that a runtime may fuse (q, k, v and gate, up) read the same input.
    """
    units: list[UnitInfo] = []
    width: dict[tuple[int | None, str], int] = {}
    for unit in units_of(2, embedding=True):
        rows, cols = unit.shapes[0]
        if generator.random() < 0.2:
            cols = int(generator.choice([96, 256, 512, 640]))
        last = unit.name.rpartition(".")[2]
        reads = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(last, last)
        cols = width.setdefault((unit.layer, reads), cols)
        units.append(replace(unit, shapes=((rows, cols),)))
    return tuple(units)


def random_table(generator: np.random.Generator, found: Rules) -> SensitivityTable:
    units = random_units(generator)
    names = [name for name in found.candidates if name != "keep"]
    names += [str(name) for name in generator.choice(ODD, 3, replace=False)]
    formats = tuple(dict.fromkeys((*names, "bf16", found.floats[0])))
    table = fake_table(units, formats, int(generator.integers(1000)))
    return SensitivityTable(
        units,
        formats,
        stored_bytes(units, [Format.parse(name) for name in formats]),
        table.kl * generator.lognormal(0, 1, table.kl.shape),
        table.stderr,
    )


@pytest.mark.parametrize("name", rules.names())
@settings(max_examples=15)
@given(seed=SEEDS)
def test_a_plan_for_a_runtime_never_breaks_its_rules(name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    found = Rules.load(name)
    apart = random_table(generator, found)
    limits = Limits(rules=found)
    table = limits.for_runtime(apart)
    problem = build_problem(table, limits)
    open_ = np.isfinite(problem.loss)
    least = np.where(open_, table.bytes, np.iinfo(np.int64).max).min(1).sum()
    most = np.where(open_, table.bytes, 0).max(1).sum()
    solution = SOLVERS.get("certified")(problem, int(generator.integers(least, most + 1)), seed=0)
    formats = {
        module: Format.parse(table.formats[f])
        for unit, f in zip(table.units, solution.choice, strict=True)
        for module in unit.modules
    }
    assert list(violations(apart.units, formats, found)) == []
    # The check is not blind: any format the runtime refuses somewhere is named there.
    for refused in ("int1-gt-asym", "int7-gt"):
        victim = apart.units[int(generator.integers(len(apart.units)))].name
        broken = formats | {victim: Format.parse(refused)}
        assert any(v.unit.startswith(victim) for v in violations(apart.units, broken, found))


@pytest.mark.parametrize("name", rules.names())
@settings(max_examples=15)
@given(seed=SEEDS)
def test_snapped_plans_keep_the_rules_and_no_unit_loses_bits(name: str, seed: int) -> None:
    from bitplan.search.plan import Plan
    from bitplan.search.solve import solve

    generator = np.random.default_rng(seed)
    found = Rules.load(name)
    units = random_units(generator)
    table = fake_table(units, ("int2-g32-asym", "int3-g64", "int4-gc", "int7-g128", "bf16"))
    plan: Plan = solve(table, "6bpw")
    before = {n: Format.parse(spec) for n, spec in plan.assignments.items()}
    rounded, changed = snap(units, plan, before, found)
    after = {n: Format.parse(spec) for n, spec in rounded.assignments.items()}
    assert list(violations(units, after, found)) == []
    assert all(fmt.bits >= before[n].bits for n, fmt in after.items())
    assert set(changed) == {n for n in before if after.get(n) != before[n]}
    shapes = {unit.name: unit.shapes[0] for unit in units}
    count = byte_count(name if changed else None)
    assert rounded.bytes == sum(count(fmt, shapes[n]) for n, fmt in after.items())
    assert rounded.runtime == (name if changed else None)

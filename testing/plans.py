"""Plans made by hand, for tests of what plans are turned into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from ..models.find import find_matrices
from ..models.fusion import fuse
from ..models.identity import state_sha256
from ..models.units import Ranges, matrix_name
from ..models.workload import LoadedModel
from ..quantizers.format import Format
from ..quantizers.runtimes import Rules, byte_count
from ..search.plan import BudgetRef, Plan, RowSet
from ..sensitivity.provenance import ModelRef


def hand_made(
    model: LoadedModel,
    formats: Mapping[str, str],
    runtime: str | None = None,
    row_sets: Mapping[str, Ranges] | None = None,
) -> Plan:
    """A plan with these formats, its bytes counted; ``row_sets`` has the rows of parts."""
    row_sets = row_sets or {}
    shapes = {unit.name: unit.shapes[0] for unit in find_matrices(model.module, row_sets)}
    count = byte_count(runtime)
    size = sum(count(Format.parse(fmt), shapes[name]) for name, fmt in formats.items())
    weights = sum(shapes[name][0] * shapes[name][1] for name in formats)
    return Plan(
        model=ModelRef(id=model.id, sha256=state_sha256(model.module)),
        assignments=dict(formats),
        row_sets={
            name: RowSet(module=matrix_name(name), rows=list(rows))
            for name, rows in row_sets.items()
        },
        budget=BudgetRef(text=str(size), bytes=size),
        bytes=size,
        weights=weights,
        bpw=8 * size / weights,
        predicted_kl=0.1,
        predicted_kl_stderr=0.01,
        lower_bound_kl=0.1,
        gap=0.0,
        metric="fisher",
        solver="certified",
        rounding="rtn",
        calibration={"source": "builtin", "length": 64},
        versions={"bitplan": "0"},
        runtime=runtime,
        created="2026-01-01T00:00:00Z",
    )


def mixed(model: LoadedModel, rules: Rules | None, formats: Sequence[str] = ()) -> Plan:
    """A plan that goes through a runtime's candidates, and keeps its rules."""
    offered = formats or [c for c in (rules.candidates if rules else ("int4-g32", "int8-g64"))]
    turn = cycle([name for name in offered if name != "keep"])
    units = find_matrices(model.module)
    groups = [[i] for i in range(len(units))]
    for rule in rules.fusion_groups if rules else ():
        groups = [members for _, members in fuse(units, rule) if len(members) > 1] + [
            g for g in groups if not any(g[0] in m for _, m in fuse(units, rule) if len(m) > 1)
        ]
    chosen: dict[str, str] = {}
    for members in sorted(groups):
        names = [units[i].name for i in members]
        if rules and any(map(rules.must_stay_float, names)):
            continue
        fmt = next(turn)
        shapes = [units[i].shapes[0] for i in members]
        for _ in offered:
            if rules is None or not any(
                rules.refusal(Format.parse(fmt), shape, name)
                for name, shape in zip(names, shapes, strict=True)
            ):
                chosen.update(dict.fromkeys(names, fmt))
                break
            fmt = next(turn)
    return hand_made(model, chosen, rules.name if rules else None)

"""The KV cache as rows of a problem: bytes, prices, what a choice means, and memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan.search.kv import KVTable, memory_budget, split_choice, uniform_choices, with_kv
from bitplan.search.problem import Constraint, Problem
from bitplan.search.solvers import SOLVERS

INF = np.inf


def make_kv(**changes: Any) -> KVTable:
    parts: dict[str, Any] = {
        "layers": ("model.layers.0", "model.layers.3"),
        "bits": (16, 8, 4),
        "bytes_per_token": np.array([[64, 34, 18], [64, 34, 18]], dtype=np.int64),
        "kl": np.array([[0.0, 0.01, 0.3], [0.0, 0.02, 0.1]]),
        "stderr": np.array([[0.0, 0.001, 0.03], [0.0, 0.002, 0.01]]),
        "scores": np.arange(18, dtype=np.float32).reshape(3, 2, 3) / 7,
        "indices": (0, 3),
    }
    return KVTable(**parts | changes)


def make_problem(**changes: Any) -> Problem:
    parts: dict[str, Any] = {
        "units": ("a", "b"),
        "formats": ("int4-g64", "bf16"),
        "bytes": np.array([[1000, 4000], [2000, 8000]], dtype=np.int64),
        "loss": np.array([[0.5, 0.0], [0.4, 0.0]]),
        "weights": 6000,
        "unit_weights": np.array([2000, 4000]),
        "kinds": ("mlp.up", "mlp.up"),
        "layers": (0, None),
        "scores": np.ones((3, 2, 2), dtype=np.float32),
        "constraints": (Constraint("latency", np.array([[1.0, 2.0], [3.0, 4.0]]), 5.0, "ms"),),
    }
    return Problem(**parts | changes)


def test_one_row_per_layer_and_one_column_per_width() -> None:
    problem = with_kv(make_problem(), make_kv(), context=100, batch=2)
    assert problem.units[2:] == ("model.layers.0.kv_cache", "model.layers.3.kv_cache")
    assert problem.formats == ("int4-g64", "bf16", "kv16", "kv8", "kv4")
    assert problem.bytes[2].tolist() == [0, 0, 12800, 6800, 3600]
    assert problem.bytes[0].tolist() == [1000, 4000, 0, 0, 0]
    assert problem.loss.tolist() == [
        [0.5, 0.0, INF, INF, INF],
        [0.4, 0.0, INF, INF, INF],
        [INF, INF, 0.0, 0.01, 0.3],
        [INF, INF, 0.0, 0.02, 0.1],
    ]
    assert problem.kinds == ("mlp.up", "mlp.up", "kv_cache", "kv_cache")
    assert problem.layers == (0, None, 0, 3)
    assert problem.unit_weights is not None
    assert problem.unit_weights.tolist() == [2000, 4000, 0, 0]
    assert problem.weights == 0
    (latency,) = problem.constraints
    assert (latency.name, latency.limit, latency.symbol) == ("latency", 5.0, "ms")
    assert latency.cost.tolist() == [
        [1.0, 2.0, 0.0, 0.0, 0.0],
        [3.0, 4.0, 0.0, 0.0, 0.0],
        [0.0] * 5,
        [0.0] * 5,
    ]


def test_scores_are_kept_only_if_both_have_them_for_the_same_sequences() -> None:
    kv = make_kv()
    problem = with_kv(make_problem(), kv, 100, 1)
    assert problem.scores is not None
    assert problem.scores.shape == (3, 4, 5)
    assert (problem.scores[:, :2, :2] == 1).all()
    assert (problem.scores[:, 2:, 2:] == kv.scores).all()
    assert with_kv(make_problem(scores=None), kv, 100, 1).scores is None
    assert with_kv(make_problem(), make_kv(scores=None), 100, 1).scores is None
    assert with_kv(make_problem(), make_kv(scores=np.ones((4, 2, 3))), 100, 1).scores is None


def test_unknown_kinds_layers_and_weights_stay_unknown() -> None:
    bare = make_problem(kinds=(), layers=(), unit_weights=None)
    problem = with_kv(bare, make_kv(), 100, 1)
    assert (problem.kinds, problem.layers, problem.unit_weights) == ((), (), None)


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (1, 0), (-5, 1)])
def test_an_empty_cache_is_refused(context: int, batch: int) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        with_kv(make_problem(), make_kv(), context, batch)


@pytest.mark.parametrize("max_bytes", [7000, 12000, 20000, 30000, 50000])
def test_the_certified_plan_is_the_best_of_all(max_bytes: int) -> None:
    weights, kv = make_problem(constraints=()), make_kv()
    problem = with_kv(weights, kv, context=50, batch=2)
    best = INF
    for first, second, *widths in product(range(2), range(2), range(3), range(3)):
        size = weights.bytes[0, first] + weights.bytes[1, second]
        size += 100 * sum(kv.bytes_per_token[i, w] for i, w in enumerate(widths))
        loss = weights.loss[0, first] + weights.loss[1, second]
        loss += sum(kv.kl[i, w] for i, w in enumerate(widths))
        best = min(best, loss if size <= max_bytes else INF)
    if best == INF:
        pytest.fail("the case should be feasible")
    solution = SOLVERS.get("certified")(problem, max_bytes)
    assert solution.bytes <= max_bytes
    assert solution.loss == pytest.approx(best, abs=1e-12)


def test_a_choice_parts_into_weights_and_bits() -> None:
    problem = with_kv(make_problem(), make_kv(), 100, 1)
    choice, bits = split_choice(problem, np.array([1, 0, 3, 2]))
    assert choice.tolist() == [1, 0]
    assert bits == {"model.layers.0": 8, "model.layers.3": 16}


def test_uniform_plans_are_every_format_with_every_width() -> None:
    problem = with_kv(make_problem(), make_kv(), 100, 1)
    plans = uniform_choices(problem)
    assert list(plans) == [
        f"{name} + {kv}" for name in ("int4-g64", "bf16") for kv in ("kv16", "kv8", "kv4")
    ]
    assert plans["bf16 + kv8"].tolist() == [1, 1, 3, 3]


def test_uniform_plans_keep_pinned_units_and_go_without_caches() -> None:
    pinned = make_problem(loss=np.array([[INF, 0.0], [0.4, 0.0]]))
    plans = uniform_choices(pinned)
    assert {name: plan.tolist() for name, plan in plans.items()} == {
        "int4-g64": [1, 0],
        "bf16": [1, 1],
    }
    both = uniform_choices(with_kv(pinned, make_kv(), 100, 1))
    assert both["int4-g64 + kv4"].tolist() == [1, 0, 4, 4]
    assert len(both) == 6


def test_a_single_width_leaves_the_formats() -> None:
    kv = make_kv(
        bits=(8,),
        bytes_per_token=np.full((2, 1), 34),
        kl=np.ones((2, 1)),
        stderr=np.ones((2, 1)),
        scores=None,
    )
    plans = uniform_choices(with_kv(make_problem(), kv, 100, 1))
    assert {name: plan.tolist() for name, plan in plans.items()} == {
        "int4-g64 + kv8": [0, 0, 2, 2],
        "bf16 + kv8": [1, 1, 2, 2],
    }


def test_memory_holds_units_the_rest_and_caches() -> None:
    problem = with_kv(make_problem(), make_kv(), context=100, batch=1)  # at least 3000 + 3600 B
    assert memory_budget(problem, 10_000, 3_400, 100) == 6_600
    with pytest.raises(ValueError) as error:
        memory_budget(problem, 9_999, 3_400, 100)
    assert str(error.value) == (
        "10.0 kB of memory are 1 B too little: the smallest weights take 3.0 kB, the rest of the "
        "model 3.4 kB and the smallest KV cache at 100 tokens 3.6 kB. Raise --vram, shorten "
        "--context (at most 99 tokens fit) or lower --batch."
    )
    with pytest.raises(ValueError, match="No context fits: raise --vram or allow formats"):
        memory_budget(problem, 6_400, 3_400, 100)


def test_the_longest_context_that_fits_does_and_one_more_does_not() -> None:
    kv, weights = make_kv(), make_problem()
    memory, outside, batch = 1_000_000, 70_000, 3
    with pytest.raises(ValueError, match=r"at most 8,583 tokens"):
        memory_budget(with_kv(weights, kv, 20_000, batch), memory, outside, 20_000)
    memory_budget(with_kv(weights, kv, 8_583, batch), memory, outside, 8_583)
    with pytest.raises(ValueError, match="at most 8,583 tokens"):
        memory_budget(with_kv(weights, kv, 8_584, batch), memory, outside, 8_584)


@pytest.mark.parametrize("scores", [None, make_kv().scores])
def test_round_trip(tmp_path: Path, scores: Any) -> None:
    kv = make_kv(scores=scores)
    kv.save(tmp_path / "kv.json")
    found = KVTable.load(tmp_path / "kv.json")
    assert (found.layers, found.bits, found.indices) == (kv.layers, kv.bits, kv.indices)
    for name in ("bytes_per_token", "kl", "stderr", "scores"):
        before, after = getattr(kv, name), getattr(found, name)
        if before is None:
            assert after is None
        else:
            assert after.dtype == before.dtype
            assert (after == before).all()


def test_windows_and_constants_are_kept(tmp_path: Path) -> None:
    kv = make_kv(windows=(0, 64), constants=(7, 0))
    kv.save(tmp_path / "kv.json")
    found = KVTable.load(tmp_path / "kv.json")
    assert (found.windows, found.constants) == (kv.windows, kv.constants)
    assert (found.sizes(2048, 2) == kv.sizes(2048, 2)).all()
    make_kv().save(tmp_path / "plain.json")
    assert "windows" not in (tmp_path / "plain.json").read_text()


def test_files_that_are_no_kv_table(tmp_path: Path) -> None:
    path = tmp_path / "kv.json"
    with pytest.raises(ValueError, match="No KV table at"):
        KVTable.load(path)
    good = make_kv()
    good.save(path)
    text = path.read_text()
    for old, new, says in (
        ('"schema": 1', '"schema": 2', "schema: Input should be 1"),
        ('"kl"', '"lk"', "kl: Field required"),
        ("{", "", "is not a valid KV table"),
        ("0.3", "-0.3", "finite and not negative"),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=says):
            KVTable.load(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kl": np.ones((2, 2))}, r"kl has shape \(2, 2\)"),
        ({"scores": np.ones((3, 2, 2))}, r"scores has shape \(2, 2\)"),
        ({"stderr": np.full((2, 3), np.nan)}, "stderr of a KV table must be finite"),
        ({"layers": ("x", "x")}, "twice"),
    ],
)
def test_tables_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(make_kv(), **changes)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitplan.models.units import UnitInfo
from bitplan.search.problem import Problem, Solution
from bitplan.sensitivity.provenance import Provenance
from bitplan.sensitivity.table import SensitivityTable

INF = np.inf


def make_table(kl: list[list[float]] | None = None) -> SensitivityTable:
    units = (
        UnitInfo("block.0.{q,k}", ("block.0.q", "block.0.k"), ((4, 8), (4, 8)), "{q,k}", 0),
        UnitInfo("embed", ("embed",), ((16, 8),), "embed", None, aliases=("lm_head",)),
    )
    return SensitivityTable(
        units=units,
        formats=("int2-g64", "int4-g64", "bf16"),
        bytes=np.array([[20, 36, 128], [40, 72, 256]], dtype=np.int64),
        kl=np.array(kl or [[0.5, 0.1, 0.0], [2.0, 0.3, np.nan]]),
        stderr=np.zeros((2, 3)),
    )


def make_problem(**changes: Any) -> Problem:
    parts: dict[str, Any] = {
        "units": ("a", "b"),
        "formats": ("low", "high"),
        "bytes": np.array([[10, 20], [70, 80]], dtype=np.int64),
        "loss": np.array([[1.0, 0.5], [2.0, 0.25]]),
        "weights": 400,
    }
    return Problem(**parts | changes)


def test_table_becomes_arrays_with_unmeasured_prices_closed() -> None:
    problem = Problem.from_table(make_table())
    assert problem.units == ("block.0.{q,k}", "embed")
    assert problem.weights == 64 + 128
    assert problem.loss[1].tolist() == [2.0, 0.3, INF]


@pytest.mark.parametrize("pattern", ["embed", "lm_head", "emb*", "lm_*"])
def test_a_pin_matches_units_modules_and_aliases(pattern: str) -> None:
    loss = Problem.from_table(make_table(), {pattern: "int4-g64"}).loss
    assert loss[1].tolist() == [INF, 0.3, INF]
    assert np.isfinite(loss[0]).all()


def test_a_pin_on_one_module_of_a_fused_unit_pins_the_unit() -> None:
    problem = Problem.from_table(make_table(), {"*.q": "bf16"})
    assert problem.allowed[0].tolist() == [False, False, True]


def test_the_exact_name_of_a_fused_unit_is_a_pin_despite_its_braces() -> None:
    problem = Problem.from_table(make_table(), {"block.0.{q,k}": "bf16"})
    assert problem.allowed.sum(axis=1).tolist() == [1, 2]


def test_later_pins_override_earlier_ones() -> None:
    problem = Problem.from_table(make_table(), {"*": "int2-g64", "embed": "int4-g64"})
    assert problem.loss.argmin(axis=1).tolist() == [0, 1]


def test_formats_restrict_all_units_but_the_pinned_ones() -> None:
    problem = Problem.from_table(make_table(), {"*.k": "bf16"}, formats=["int2-g64"])
    assert problem.formats == ("int2-g64", "int4-g64", "bf16")  # indices stay the table's
    assert problem.allowed.tolist() == [[False, False, True], [True, False, False]]


def test_a_pin_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'block.0.qq' matches no unit or module.*'block\.0\.q'"):
        Problem.from_table(make_table(), {"block.0.qq": "bf16"})


@pytest.mark.parametrize(("pins", "formats"), [({"embed": "int4-g46"}, None), ({}, ["int4-g46"])])
def test_an_unknown_format_names_the_nearest(
    pins: dict[str, str], formats: list[str] | None
) -> None:
    with pytest.raises(ValueError, match=r"'int4-g46' is not in the profile\. Did you .*int4-g64"):
        Problem.from_table(make_table(), pins, formats)


def test_a_pin_to_an_unmeasured_format_names_the_unit() -> None:
    with pytest.raises(ValueError, match="Unit 'embed' has no allowed format"):
        Problem.from_table(make_table(), {"embed": "bf16"})


def test_keep_is_the_dtype_of_the_checkpoint() -> None:
    kl = [[0.5, 0.1, 0.0], [2.0, 0.3, 0.0]]
    table = replace(make_table(kl), provenance=Provenance(dtype="bfloat16"))
    pinned = Problem.from_table(table, {"lm_head": "keep"}, formats=["int2-g64"])
    assert pinned.allowed.tolist() == [[True, False, False], [False, False, True]]
    kept = Problem.from_table(table, formats=["int4-g64", "keep"])
    assert kept.allowed.tolist() == [[False, True, True]] * 2


@pytest.mark.parametrize(
    ("provenance", "says"),
    [
        (Provenance(), r"does not record.* with 'keep' among --formats"),
        (Provenance(dtype="float32"), r"means 'fp32'.*with 'fp32' added to --formats"),
    ],
)
def test_keep_that_is_unknown_or_not_profiled(provenance: Provenance, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Problem.from_table(replace(make_table(), provenance=provenance), {"embed": "keep"})


@pytest.mark.parametrize("loss", [np.nan, -np.inf])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match=r"Unit 'b' in 'low' costs .* nats"):
        make_problem(loss=np.array([[1.0, 0.5], [loss, 0.25]]))


def test_negative_losses_are_allowed_and_negative_bytes_are_not() -> None:
    assert make_problem(loss=-np.ones((2, 2))).allowed.all()
    with pytest.raises(ValueError, match=r"Unit 'a' in 'low' costs 1\.0 nats and -1 B"):
        make_problem(bytes=np.array([[-1, 20], [70, 80]]))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        make_problem(loss=np.ones((2, 3)))


def test_infeasible_budget_says_the_minimum_the_largest_unit_and_what_to_do() -> None:
    with pytest.raises(ValueError) as error:
        make_problem().check_feasible(60)
    assert str(error.value) == (
        "Budget of 60 B is 20 B below the smallest possible plan (80 B, 1.600 bits per weight). "
        "The largest unit there is 'b' (70 B). Raise the budget or allow a format with fewer bits."
    )
    make_problem().check_feasible(80)


def test_the_minimum_counts_allowed_formats_only() -> None:
    problem = make_problem(loss=np.array([[INF, 0.5], [2.0, 0.25]]))
    with pytest.raises(ValueError, match=r"smallest possible plan \(90 B"):
        problem.check_feasible(89)


def test_best_choice_takes_the_smaller_of_equal_losses() -> None:
    problem = make_problem(loss=np.array([[0.5, 0.5], [2.0, 0.25]]))
    assert problem.best_choice().tolist() == [0, 1]


def test_uniform_choice_keeps_pinned_units_and_refuses_closed_ones() -> None:
    pinned = make_problem(loss=np.array([[INF, 0.5], [2.0, 0.25]]))
    choice = pinned.uniform_choice(0)
    assert choice is not None
    assert choice.tolist() == [1, 0]
    three = make_problem(
        formats=("low", "mid", "high"),
        bytes=np.ones((2, 3), dtype=np.int64),
        loss=np.array([[INF, 1.0, 1.0], [1.0, 1.0, 1.0]]),
    )
    assert three.uniform_choice(0) is None


def test_without_a_free_unit_only_the_format_of_all_pins_is_uniform() -> None:
    mixed = make_problem(loss=np.array([[INF, 0.5], [2.0, INF]]))
    assert [mixed.uniform_choice(f) for f in range(2)] == [None, None]
    same = make_problem(loss=np.array([[INF, 0.5], [INF, 0.25]]))
    assert same.uniform_choice(0) is None
    choice = same.uniform_choice(1)
    assert choice is not None
    assert choice.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("loss", "bound", "gap"), [(2.0, 1.5, 0.25), (2.0, 2.0, 0.0), (0.0, 0.0, 0.0), (0.0, -1.0, 1.0)]
)
def test_gap_is_relative_and_finite(loss: float, bound: float, gap: float) -> None:
    assert Solution(np.zeros(1, dtype=np.intp), loss, 1, bound).gap == gap


def test_a_bound_above_the_loss_is_lowered_to_it() -> None:
    solution = make_problem().evaluate(np.array([0, 1]), INF)
    assert (solution.loss, solution.bytes, solution.lower_bound) == (1.25, 90, 1.25)

"""Limits besides bytes: what each removes, what it costs, and what conflicts are told as."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitplan.kernels.latency import Device
from bitplan.models.units import UnitInfo
from bitplan.quantizers.runtimes import Rules
from bitplan.search.limits import Limits, build_problem, parse_assignments, parse_bans
from bitplan.search.limits.bops import parse_count
from bitplan.search.limits.latency import read_latency
from bitplan.search.problem import Problem
from bitplan.search.solve import solve
from bitplan.sensitivity.provenance import Provenance
from bitplan.sensitivity.table import SensitivityTable
from bitplan.tests.fakes import fake_table, transformer_units

FORMATS = ("int2-g64", "int4-g64", "int6-g128", "int8-g64", "bf16")
UP = "model.layers.1.mlp.up_proj"


def table(formats: tuple[str, ...] = FORMATS) -> SensitivityTable:
    return fake_table(transformer_units(2, embedding=True), formats)


def taken(problem: Problem, unit: str) -> list[str]:
    row = problem.allowed[problem.units.index(unit)]
    return [name for name, allowed in zip(problem.formats, row, strict=True) if allowed]


def test_without_limits_it_is_the_table() -> None:
    plain, built = Problem.from_table(table()), build_problem(table(), Limits())
    assert (built.loss == plain.loss).all()
    assert (built.bytes == plain.bytes).all()
    assert built.constraints == ()
    assert (built.units, built.kinds) == (plain.units, plain.kinds)


def test_formats_and_pins_are_those_of_the_table() -> None:
    limits = Limits(formats=("int2-g64", "int4-g64"), pins={"lm_head": "bf16", UP: "int8-g64"})
    problem = build_problem(table(), limits)
    assert taken(problem, "model.embed_tokens") == ["bf16"]
    assert taken(problem, UP) == ["int8-g64"]
    assert taken(problem, "model.layers.0.mlp.up_proj") == ["int2-g64", "int4-g64"]


def test_a_kind_is_that_matrix_of_every_layer() -> None:
    problem = build_problem(table(), Limits(pins={"mlp.up_proj": "int4-g64"}))
    pinned = [u for u in problem.units if taken(problem, u) == ["int4-g64"]]
    assert pinned == ["model.layers.0.mlp.up_proj", UP]


def test_kinds_of_the_members_mean_a_fused_unit() -> None:
    fused = table().merged(["q_proj,k_proj,v_proj"])
    for name in ("self_attn.v_proj", "self_attn.{q_proj,k_proj,v_proj}"):
        problem = build_problem(fused, Limits(pins={name: "int8-g64"}))
        assert (problem.allowed.sum(axis=1) == 1).sum() == 2


def test_bans_take_globs_on_formats() -> None:
    limits = Limits(bans={"*.mlp.*": ("int2*", "*-g128"), "lm_head": ("bf16",)})
    problem = build_problem(table(), limits)
    assert taken(problem, UP) == ["int4-g64", "int8-g64", "bf16"]
    assert taken(problem, "model.embed_tokens") == ["int2-g64", "int4-g64", "int6-g128", "int8-g64"]
    assert len(taken(problem, "model.layers.0.self_attn.q_proj")) == 5


def test_keep_can_be_banned() -> None:
    kept = replace(table(), provenance=Provenance(dtype="bfloat16"))
    problem = build_problem(kept, Limits(bans={"*": ("keep",)}))
    assert not problem.allowed[:, 4].any()


@pytest.mark.parametrize("floor", ["int6", "int6-g64-asym", "int6-g128"])
def test_a_floor_counts_bits_whatever_the_group(floor: str) -> None:
    problem = build_problem(table(), Limits(at_least={"lm_head": floor}))
    assert taken(problem, "model.embed_tokens") == ["int6-g128", "int8-g64", "bf16"]
    assert len(taken(problem, UP)) == 5


def test_a_ceiling_and_floats_by_width() -> None:
    limits = Limits(at_most={"*.mlp.*": "int4"}, at_least={"lm_head": "bf16"})
    problem = build_problem(table(), limits)
    assert taken(problem, UP) == ["int2-g64", "int4-g64"]
    assert taken(problem, "model.embed_tokens") == ["bf16"]


def test_keep_as_a_floor_is_the_dtype_of_the_checkpoint() -> None:
    kept = replace(table(), provenance=Provenance(dtype="bfloat16"))
    problem = build_problem(kept, Limits(at_least={"lm_head": "keep"}))
    assert taken(problem, "model.embed_tokens") == ["bf16"]


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        (Limits(pins={"lm_haed": "bf16"}), "--pin"),
        (Limits(bans={"lm_haed": ("bf16",)}), "--ban"),
        (Limits(at_least={"lm_haed": "int4"}), "--min"),
        (Limits(at_most={"lm_haed": "int4"}), "--max"),
        (Limits(latency={"lm_haed": {"*": 1.0}}, max_ms=1), "--latency"),
    ],
)
def test_a_glob_that_matches_nothing_names_the_nearest(limits: Limits, option: str) -> None:
    says = f"{option} 'lm_haed' matches no unit or module. Did you mean 'lm_head'"
    with pytest.raises(ValueError, match=says):
        build_problem(table(), limits)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (
            Limits(bans={"*": ("int3*",)}),
            r"--ban 'int3\*' matches no format of the profile\. .*int2",
        ),
        (Limits(at_least={"*": "int9"}), "Unknown format 'int9'"),
        (Limits(at_most={"*": "int4-g65"}), "Unknown format 'int4-g65'"),
        (Limits(formats=("int3-g64",)), "'int3-g64' is not in the profile"),
    ],
)
def test_unknown_formats(limits: Limits, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_problem(table(), limits)


def test_limits_that_leave_nothing_are_all_named() -> None:
    limits = Limits(pins={"lm_head": "int4-g64"}, at_least={"*embed*": "int6"})
    with pytest.raises(ValueError) as error:
        build_problem(table(), limits)
    assert str(error.value) == (
        "Unit 'model.embed_tokens' is left without a format: --pin 'lm_head=int4-g64' leaves "
        "int4-g64, --min '*embed*=int6' refuses int4-g64. Drop or loosen one of these, or profile "
        "without it (--exclude 'model.embed_tokens')."
    )


def test_a_floor_above_a_ceiling_is_told_with_the_number_of_units() -> None:
    limits = Limits(formats=("int4-g64", "bf16"), at_least={"*": "int6"}, at_most={"*": "int8"})
    with pytest.raises(
        ValueError,
        match=r"--formats int4-g64,bf16 leaves int4-g64, bf16, --min '\*=int6' refuses int4-g64, "
        r"--max '\*=int8' refuses bf16\. So are 14 more\.",
    ):
        build_problem(table(), limits)


def test_rules_restrict_and_the_error_offers_what_the_runtime_takes() -> None:
    formats = ("int2-g64", "int4-g64", "int8-gc", "bf16")
    rules = Rules.load("vllm")
    limits = Limits(rules=rules)
    problem = build_problem(limits.for_runtime(table(formats)), limits)
    assert taken(problem, "model.embed_tokens") == ["bf16"]
    qkv = "model.layers.0.self_attn.{q_proj,k_proj,v_proj}"
    assert taken(problem, qkv) == ["int4-g64", "int8-gc", "bf16"]
    with pytest.raises(ValueError) as error:
        build_problem(limits.for_runtime(table(formats[:3])), limits)
    assert str(error.value) == (
        "Unit 'model.embed_tokens' is left without a format: the profile leaves int2-g64, "
        "int4-g64, int8-gc, --for vllm refuses int2-g64, int4-g64, int8-gc (bits: it takes 4, 8, "
        "not 2; unquantized: model.embed_tokens must stay one of bf16, fp16). Profile "
        "'model.embed_tokens' in a format that vllm takes there (bf16, fp16), or profile "
        "without it (--exclude 'model.embed_tokens')."
    )


def test_a_tied_embedding_is_refused_by_either_name() -> None:
    rules = Rules.load("vllm").model_copy(update={"unquantized": ("lm_head",), "fused": ()})
    limits = Limits(rules=rules)
    problem = build_problem(limits.for_runtime(table()), limits)
    assert taken(problem, "model.embed_tokens") == ["bf16"]


def test_every_matrix_of_a_fused_unit_must_be_allowed() -> None:
    units = (UnitInfo("m.{a,b}", ("m.a", "m.b"), ((32, 64), (33, 64)), "{a,b}", 0),)
    limits = Limits(rules=Rules.load("vllm"))
    priced = limits.for_runtime(fake_table(units, ("int4-g32", "bf16")))
    problem = build_problem(priced, limits)
    assert taken(problem, "m.{a,b}") == ["bf16"]


def test_units_a_runtime_fuses_must_be_one() -> None:
    limits = Limits(rules=Rules.load("vllm"))
    with pytest.raises(
        ValueError,
        match=r"vllm runs 'model\.layers\.0\.self_attn\.\{q_proj,k_proj,v_proj\}' as one matrix "
        r"with one format, but the table has 3 units .*--group 'q_proj,k_proj,v_proj'",
    ):
        build_problem(table(), limits)


def test_bytes_of_another_layout_are_refused() -> None:
    limits = Limits(rules=Rules.load("mlx"))
    plain = fake_table(transformer_units(1), ("int4-g64", "int4-g64-asym", "bf16"))
    with pytest.raises(ValueError, match="does not count the bytes that mlx stores"):
        build_problem(plain, limits)
    problem = build_problem(limits.for_runtime(plain), limits)
    u, weights = problem.units.index("model.layers.0.mlp.up_proj"), 1536 * 576
    # A scale and a bias per group of 64: float16 if symmetric, else float32.
    assert (8 * problem.bytes[u] / weights).tolist() == [4.5, 5.0, 16.0]


def test_bops_are_weights_times_bits_times_sixteen() -> None:
    problem = build_problem(table(), Limits(max_bops=12e9))
    (bops,) = problem.constraints
    assert (bops.name, bops.limit) == ("BOPs", 12e9)
    u = problem.units.index(UP)
    assert bops.cost[u].tolist() == [1536 * 576 * b * 16 for b in (2, 4, 6, 8, 16)]


@pytest.mark.parametrize(
    ("text", "count"), [("12G", 12e9), ("1.5k", 1500), ("7", 7), ("2 T", 2e12), ("3M", 3e6)]
)
def test_counts(text: str, count: float) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "12g", "1e9", "12GB"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="Write a positive one such as 12G"):
        parse_count(text)


def times(entries: dict[str, dict[str, float]], of: SensitivityTable, **more: Any) -> Problem:
    return build_problem(of, Limits(latency=entries, max_ms=3.0, **more))


def test_the_most_specific_time_counts() -> None:
    problem = times(
        {
            UP: {"int4-g64": 9.0},
            "mlp.up_proj": {"int4*": 8.0, "int2-g64": 7.0},
            "*": {"*": 1.0, "int8-g64": 2.0},
            "*.up_proj": {"bf16": 5.0, "*": 4.0},
        },
        table(),
    )
    (latency,) = problem.constraints
    assert (latency.name, latency.limit, latency.symbol) == ("latency", 3.0, "ms")
    cost = dict(zip(problem.units, latency.cost.tolist(), strict=True))
    #                int2 int4 int6 int8 bf16
    assert cost[UP] == [7.0, 9.0, 4.0, 2.0, 5.0]
    assert cost["model.layers.0.mlp.up_proj"] == [7.0, 8.0, 4.0, 2.0, 5.0]
    assert cost["model.embed_tokens"] == [1.0, 1.0, 1.0, 2.0, 1.0]


def test_a_later_glob_overrides_an_earlier_one() -> None:
    problem = times({"*": {"*": 1.0}, "*.mlp.*": {"int*": 2.0, "int4*": 3.0}}, table())
    row = problem.constraints[0].cost[problem.units.index(UP)]
    assert row.tolist() == [2.0, 3.0, 2.0, 2.0, 1.0]


def test_a_fused_unit_is_the_sum_of_its_modules_or_named_whole() -> None:
    fused = table().merged(["q_proj,k_proj,v_proj"])
    first, second = (f"model.layers.{i}.self_attn.{{q_proj,k_proj,v_proj}}" for i in range(2))
    entries = {"*": {"*": 1.0}, "self_attn.v_proj": {"*": 0.5}, second: {"int4-g64": 9.0}}
    problem = times(entries, fused)
    cost = dict(zip(problem.units, problem.constraints[0].cost.tolist(), strict=True))
    assert cost[first] == [2.5] * 5
    assert cost[second] == [2.5, 9.0, 2.5, 2.5, 2.5]
    assert cost["model.embed_tokens"] == [1.0] * 5


def test_only_allowed_options_need_a_time() -> None:
    entries = {"*": {"int4*": 1.0}}
    with pytest.raises(
        ValueError, match=r"no time for 'model\.embed_tokens' in int2-g64 \(60 such gaps\)"
    ):
        times(entries, table())
    problem = times(entries, table(), formats=("int4-g64",))
    assert np.isfinite(problem.constraints[0].cost).all()


def test_a_misspelt_format_in_a_latency_table_is_an_error_and_an_unprofiled_one_is_not() -> None:
    times({"*": {"*": 1.0, "int3-g64": 2.0}}, table())
    with pytest.raises(ValueError, match="Unknown format 'int4-g46'"):
        times({"*": {"*": 1.0, "int4-g46": 2.0}}, table())


def test_latency_files(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    with pytest.raises(ValueError, match="No latency table at"):
        read_latency(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_latency(path)
    broken: list[Any] = [[], {"a": 1}, {"a": {"int4-gc": -1}}, {"a": {"int4-gc": "x"}}]
    for bad in broken:
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"is no latency table: .* Write"):
            read_latency(path)
    path.write_text(json.dumps({"*": {"*": 2}}))
    problem = build_problem(table(), Limits(latency=path, max_ms=5))
    assert (problem.constraints[0].cost == 2.0).all()


def test_a_limit_on_time_needs_times_and_only_one_kind() -> None:
    with pytest.raises(ValueError, match="--max-ms needs times: --latency-device"):
        Limits(max_ms=3.0)
    with pytest.raises(ValueError, match="--latency holds measured times and --latency-device"):
        Limits(latency={"*": {"*": 1.0}}, device=Device.load("h100"), max_ms=3.0)


def test_texts_of_the_command_line() -> None:
    assert parse_assignments("--min", ["a=int4", " b.* = int6 ", "a=int8"]) == {
        "a": "int8",
        "b.*": "int6",
    }
    assert parse_bans(["a=int2*, int3*", "a=bf16"]) == {"a": ("int2*", "int3*", "bf16")}
    for text in ("lm_head", "=int4", "lm_head="):
        with pytest.raises(ValueError, match=f"--min '{text}' is not GLOB=FORMAT"):
            parse_assignments("--min", [text])


def test_a_budget_below_what_a_runtime_leaves_unquantized_names_the_rule() -> None:
    table = fake_table(transformer_units(3, embedding=True), ("int4-g32", "int8-g64", "bf16"))
    with pytest.raises(ValueError) as error:
        solve(table, "4.5bpw", limits=Limits(rules=Rules.load("vllm")))
    assert "vllm keeps 'model.embed_tokens' at 16 bits or more (its rule `unquantized`)" in str(
        error.value
    )
    assert "--exclude '*embed*', so that the budget counts only" in str(error.value)
    without = fake_table(transformer_units(3), ("int4-g32", "int8-g64", "bf16"))
    assert solve(without, "4.6bpw", limits=Limits(rules=Rules.load("vllm"))).bpw <= 4.6
    with pytest.raises(ValueError, match="Raise the budget or allow a format with fewer bits"):
        solve(without, "2bpw", limits=Limits(rules=Rules.load("vllm")))
    foreign = fake_table(transformer_units(3), ("int3-g64", "int4-g64-asym", "bf16"))
    with pytest.raises(ValueError, match=r"llama\.cpp runs \d+ of \d+ units in no smaller format"):
        solve(foreign, "4.5bpw", limits=Limits(rules=Rules.load("llama.cpp")))

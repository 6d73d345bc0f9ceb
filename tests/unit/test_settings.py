"""What a run is asked for: one goal, and the same after a trip through job.json."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from bitplan._base.settings import settings_of
from bitplan.jobs.limit_settings import FrontierSettings, SolveSettings
from bitplan.jobs.settings import ProfileSettings, SearchSettings, read_settings

PROFILE = ProfileSettings(
    "tiny", formats=("int4-g32", "keep"), groups=("q_proj,k_proj",), exclude=("lm_head",), seed=7
)
SEARCH = SearchSettings(
    budget="3.5bpw",
    refine=2,
    pins={"lm_head": "int6-g64"},
    bans={"*": ("int2*", "int3*")},
    at_least={"*.o_proj": "int5"},
    at_most={"*.up_proj": "int4"},
    runtime="vllm",
    max_bops=1e9,
    storage="sqlite:///x",
)


def recorded(**changed: Any) -> dict[str, Any]:
    settings = {"profile": asdict(PROFILE), "search": asdict(SEARCH)}
    copy: dict[str, Any] = json.loads(json.dumps(settings))
    for key, value in changed.items():
        copy[key].update(value)
    return copy


def test_settings_survive_json() -> None:
    profile, search = read_settings(recorded())
    assert profile == PROFILE
    assert search == SEARCH
    assert isinstance(profile.formats, tuple)
    assert isinstance(search.bans["*"], tuple)


@pytest.mark.parametrize(
    "goals",
    [
        {},
        {"budget": "4bpw", "vram": "1GB"},
        {"max_kl": 0.1, "max_ppl": 20.0},
        {"budget": "4bpw", "max_kl": 0.1},
    ],
)
def test_exactly_one_goal(goals: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="Give one goal: --budget, --vram, --max-kl, --max-ppl"
    ) as e:
        SearchSettings(**goals)
    for name in goals:
        assert f"--{name.replace('_', '-')}" in str(e.value).partition(";")[2] or not goals


@pytest.mark.parametrize("goal", [{"vram": "1GB"}, {"max_kl": 0.1}, {"max_ppl": 20.0}])
def test_only_a_budget_can_be_refined(goal: dict[str, Any]) -> None:
    name = f"--{next(iter(goal)).replace('_', '-')}"
    with pytest.raises(ValueError, match=f"--refine works with --budget only, not with {name}"):
        SearchSettings(refine=2, **goal)
    SearchSettings(refine=0, **goal)


@pytest.mark.parametrize(
    ("goal", "name"),
    [
        ({"budget": "4.3bpw"}, "4.3bpw"),
        ({"budget": "file:82MB"}, "file-82MB"),
        ({"vram": "8GiB"}, "vram8GiB"),
        ({"max_kl": 0.05}, "kl0.05"),
        ({"max_ppl": 20.0}, "ppl20.0"),
        ({"max_kl": 0.05, "fastest": True, "latency_device": "h100"}, "kl0.05-fastest"),
    ],
)
def test_the_goal_names_the_run_folder(goal: dict[str, Any], name: str) -> None:
    assert SearchSettings(**goal).goal == name
    assert Path(name).name == name


def test_limits_hold_every_restriction(tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    limits = replace(SEARCH, latency=str(times), max_ms=3.0).limits()
    assert (limits.pins, limits.bans) == (SEARCH.pins, SEARCH.bans)
    assert (limits.at_least, limits.at_most) == (SEARCH.at_least, SEARCH.at_most)
    assert (limits.max_bops, limits.latency, limits.max_ms) == (1e9, times, 3.0)
    assert limits.rules is not None and limits.rules.name == "vllm"
    assert SearchSettings(budget="4bpw").limits().rules is None


def test_a_device_computes_a_batch(tmp_path: Path) -> None:
    limits = SearchSettings(budget="4bpw", latency_device="h100", batch=8, max_ms=2.0).limits()
    assert limits.device is not None and limits.device.name == "h100"
    assert (limits.tokens, limits.max_ms) == (8, 2.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget": "4bpw", "batch": 8}, "needs --vram or --latency-device"),
        ({"budget": "4bpw", "context": 8}, "--context sizes a KV cache"),
        ({"max_kl": 0.1, "fastest": True}, "--fastest needs --max-kl or --max-ppl and times"),
        ({"budget": "4bpw", "fastest": True, "latency_device": "h100"}, "--fastest needs"),
    ],
)
def test_options_that_need_others(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SearchSettings(**settings)


def test_limits_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="--max-ms needs times"):
        replace(SEARCH, max_ms=3.0).limits()
    with pytest.raises(ValueError, match="vlm"):
        replace(SEARCH, runtime="vlm").limits()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": recorded()["profile"]}, "holds the job of `bitplan profile`"),
        (recorded(search={"sover": "ilp"}), "sover"),
        (recorded(profile={"sequences": "many"}), "sequences"),
        ({"search": recorded()["search"]}, "cannot be read"),
        (recorded(search={"vram": "1GB"}), "Give one goal"),
    ],
)
def test_settings_of_another_version_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(settings)


@pytest.mark.parametrize(
    "settings", [ProfileSettings, SearchSettings, SolveSettings, FrontierSettings]
)
def test_every_setting_says_what_it_means(settings: type[Any]) -> None:
    declared = {setting.name: setting.option.help for setting in settings_of(settings)}
    assert {field.name for field in fields(settings)} - declared.keys() <= {"command"}
    assert [name for name, text in declared.items() if not text.rstrip(".").strip()] == []
    assert all(text.endswith(".") for text in declared.values())


def test_limits_of_a_saved_profile_are_those_of_a_search() -> None:
    limits: dict[str, Any] = {"pins": {"lm_head": "int6-g64"}, "runtime": "vllm"}
    more: dict[str, Any] = {"latency_device": "h100", "max_ms": 2.0, "batch": 4}
    searched = SearchSettings("4bpw", **limits, **more).limits()
    assert SolveSettings(**limits, **more).limits() == searched
    fused = FrontierSettings(**limits, formats=("int4-gc",), groups=("q,k",)).limits()
    assert fused == replace(
        SearchSettings("4bpw", **limits).limits(), formats=("int4-gc",), groups=("q,k",)
    )
    with pytest.raises(ValueError, match="needs --latency-device"):
        SolveSettings(batch=4)


@pytest.mark.parametrize(
    ("asked", "second"),
    [
        ({}, "code"),
        ({"evaluation": "notes.txt"}, "code"),
        ({"evaluation": "chat"}, "code"),
        ({"evaluation": "code"}, "prose"),
        ({"eval_also": "none"}, None),
        ({"eval_also": "chat"}, "chat"),
    ],
)
def test_the_second_text_is_of_another_kind(asked: dict[str, Any], second: str | None) -> None:
    assert SearchSettings(budget="4bpw", **asked).second_text == second


def test_the_default_calibration_is_a_mixture() -> None:
    assert ProfileSettings().calibration == "mixture"

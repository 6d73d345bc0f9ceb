"""Contracts can fail: plugins with one thing wrong, and the test that must notice it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from bitplan.exporters.targets import EXPORTERS
from bitplan.models.find import find_units
from bitplan.models.sites import SITES, places
from bitplan.models.sites.conv import Conv
from bitplan.models.workload import LoadedModel
from bitplan.quantizers import format as formats
from bitplan.quantizers.families._codes import Codes
from bitplan.quantizers.families.integers import Integers
from bitplan.quantizers.format import Format, family
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor
from bitplan.search.problem import Problem, Solution
from bitplan.search.solvers import SOLVERS
from bitplan.sensitivity.metrics import METRICS, Scores, Task
from bitplan.testing import (
    Contract,
    ExporterContract,
    FamilyContract,
    MethodContract,
    MetricContract,
    SiteContract,
    SolverContract,
    toy_of,
    toy_task,
)
from bitplan.testing.problems import equipped, synthetic_problem
from bitplan.testing.toys import drawn

COUNTER = itertools.count()


def breaks(contract: type[Contract], plugin: object, test: str, *arguments: object) -> None:
    """The test of a contract fails for this plugin."""
    broken = type("Broken", (contract,), {"plugin": lambda _self, _name: plugin})()
    with pytest.raises(AssertionError):
        getattr(broken, test)(*arguments)


def with_pin() -> Problem:
    problem = synthetic_problem(12, 4, seed=1)
    loss = problem.loss.copy()
    loss[3, :3] = np.inf
    return equipped(replace(problem, loss=loss))


def certified(problem: Problem, max_bytes: int, seed: int = 0) -> Solution:
    return SOLVERS.get("certified")(problem, max_bytes, seed=seed)


WRONG_SOLVERS: dict[str, tuple[str, Callable[..., Solution]]] = {
    "over the budget": (
        "test_respects_bytes_and_counts_exactly",
        lambda problem, _limit, **_: problem.evaluate(problem.best_choice(), -np.inf),
    ),
    "a byte too few": (
        "test_respects_bytes_and_counts_exactly",
        lambda p, b, **_: replace(s := certified(p, b), bytes=s.bytes - 1),
    ),
    "a bound above the loss": (
        "test_respects_bytes_and_counts_exactly",
        lambda p, b, **_: replace(s := certified(p, b), lower_bound=1.01 * s.loss),
    ),
    "a format that is closed": (
        "test_never_takes_a_closed_format",
        lambda p, b, **_: certified(replace(p, loss=np.where(p.allowed, p.loss, 0.0)), b),
    ),
    "another answer each time": (
        "test_is_deterministic",
        lambda p, b, seed: SOLVERS.get("random")(p, b, seed=next(COUNTER)),
    ),
    "a plan for no budget": (
        "test_obeys_further_limits_or_refuses_them",
        lambda p, b, **_: certified(replace(p, constraints=()), b),
    ),
    "an oracle it has no use for": (
        "test_asks_the_oracle_if_it_says_so",
        lambda p, b, **_: p.oracle.mean_kl(p.best_choice()) and certified(p, b),
    ),
}


@pytest.mark.parametrize("what", WRONG_SOLVERS)
def test_solvers(what: str) -> None:
    test, solver = WRONG_SOLVERS[what]
    problem = () if "oracle" in what else (with_pin(),)
    breaks(SolverContract, solver, test, "certified", *problem)


@pytest.mark.parametrize("factor", [1.5, 0.0])
def test_solvers_with_a_wrong_bound_or_a_plan_that_is_not_the_best(factor: float) -> None:
    def solver(problem: Problem, max_bytes: int, *, seed: int = 0) -> Solution:
        if factor:  # a bound that does not hold, with a plan that is far from it
            worst = SOLVERS.get("random")(problem, max_bytes)
            return replace(worst, lower_bound=worst.loss)
        return SOLVERS.get("uniform")(problem, max_bytes)

    name = "greedy" if factor else "dp"  # what it says of itself
    breaks(SolverContract, solver, "test_a_bound_holds_and_a_claimed_optimum_is_one", name, 0)


def changed(scores: Scores, **changes: Any) -> Scores:
    return replace(scores, **changes)


WRONG_METRICS: dict[str, tuple[str, Callable[[Scores], Scores]]] = {
    "units in another order": (
        "test_what_changes_no_weight_costs_nothing",
        lambda s: changed(s, values=s.values[:, ::-1]),
    ),
    "formats in another order": (
        "test_fewer_bits_cost_more_in_every_unit",
        lambda s: changed(s, values=s.values[..., ::-1]),
    ),
    "one unit forgotten": (
        "test_fewer_bits_cost_more_in_every_unit",
        lambda s: changed(s, values=s.values * np.array([1, 0, 1, 1], np.float32)[:, None]),
    ),
    "a format that depends on its neighbours": (
        "test_formats_are_priced_each_for_itself",
        lambda s: changed(s, values=np.cumsum(s.values, axis=2)),
    ),
    "per sequence, not per token": (
        "test_nats_are_nats",
        lambda s: changed(s, values=s.values * np.sqrt(12.0)),
    ),
    "the Fisher form without its half": (
        "test_nats_are_nats",
        lambda s: changed(s, values=s.values * np.sqrt(2.0)),
    ),
    "a price where nothing changes": (
        "test_what_changes_no_weight_costs_nothing",
        lambda s: changed(s, values=s.values + np.float32(1e-9)),
    ),
    "another draw each time": (
        "test_repeats_with_its_seed",
        lambda s: changed(s, values=s.values * np.float32(1 + 1e-6 * next(COUNTER))),
    ),
    "NaN": (
        "test_prices_every_unit_in_every_format",
        lambda s: changed(s, values=s.values * np.float32("nan")),
    ),
    "signs that it does not tell of": (
        "test_prices_every_unit_in_every_format",
        lambda s: changed(s, signed=False, diagonal=None),
    ),
}


@pytest.mark.parametrize("what", WRONG_METRICS)
def test_metrics(what: str) -> None:
    test, change = WRONG_METRICS[what]

    def metric(task: Task) -> Scores:
        return change(METRICS.get("fisher_probe")(task))

    alone = test in (
        "test_what_changes_no_weight_costs_nothing",
        "test_formats_are_priced_each_for_itself",
    )
    breaks(MetricContract, metric, test, "fisher_probe", *(() if alone else (toy_task(),)))


def test_metrics_that_leave_something_behind_or_do_not_count() -> None:
    def careless(task: Task) -> Scores:
        next(task.model.module.parameters()).requires_grad_(True)
        return METRICS.get("weight_mse")(replace(task, advance=lambda _: None))

    breaks(MetricContract, careless, "test_leaves_the_model_as_it_was", "x", toy_task())
    breaks(MetricContract, careless, "test_counts_the_samples_it_has_done", "x")


WEIGHT = drawn((24, 160), 0) / 16
INPUTS = drawn((500, 160), 1).cumsum(1) / 8
EVIDENCE = Evidence(hessian=INPUTS.T @ INPUTS / len(INPUTS))


def rtn(weight: Tensor, spec: Format) -> PackedTensor:
    return METHODS.get("rtn")(weight, spec, Evidence())


WRONG_METHODS: dict[str, tuple[str, Callable[[Tensor, Format], PackedTensor]]] = {
    "another format": (
        "test_gives_the_format_asked_for",
        lambda w, _fmt: rtn(w, Format.parse("int4-g32")),
    ),
    "transposed": ("test_gives_the_format_asked_for", lambda w, fmt: rtn(w.T.contiguous(), fmt)),
    "the weight overwritten": ("test_gives_the_format_asked_for", lambda w, f: rtn(w.mul_(2), f)),
    "far from the weight": (
        "test_loses_no_more_than_rounding_to_nearest",
        lambda w, fmt: rtn(1.5 * w, fmt),
    ),
    "another answer each time": (
        "test_repeats",
        lambda w, fmt: rtn(w * (1 + 0.1 * next(COUNTER)), fmt),
    ),
    "not the nearest on its grid": ("test_traits_say_what_is_true", lambda w, f: rtn(0.9 * w, f)),
}


@pytest.mark.parametrize("what", WRONG_METHODS)
def test_methods(what: str) -> None:
    test, method = WRONG_METHODS[what]
    plugin = lambda weight, fmt, _evidence: method(weight, fmt)  # noqa: E731
    breaks(MethodContract, plugin, test, "rtn", "int3-g64-asym", WEIGHT.clone(), EVIDENCE)


def test_methods_that_ignore_the_evidence_they_ask_for() -> None:
    test = "test_loses_no_more_than_rounding_to_nearest"
    plugin = lambda weight, fmt, _evidence: rtn(weight, fmt)  # noqa: E731
    breaks(MethodContract, plugin, test, "gptq", "int3-gc", WEIGHT, EVIDENCE)


def decoded(packed: PackedTensor) -> tuple[Format, tuple[int, int], PackedTensor]:
    return packed.fmt, packed.shape, packed


def odds(importance: Tensor | None) -> Tensor | None:
    return None if importance is None else 1 / importance


def test_families(monkeypatch: pytest.MonkeyPatch) -> None:
    contract, weight, fmt = FamilyContract(), drawn((6, 70), 0) / 16, Format.parse("int4-g32-asym")
    packed = PackedTensor.pack(weight, fmt, family("integers").fit(weight, fmt))

    def fails(test: str, *arguments: object) -> None:
        with pytest.raises(AssertionError):
            getattr(contract, test)(*arguments)

    decode, render = Codes.decode, Codes.render
    with monkeypatch.context() as patch:  # rows of another place
        patch.setattr(Codes, "decode", lambda s, f, c, t, r: decode(s, f, c, t, r).roll(1, 0))
        fails("test_some_rows_decode_as_all_do", *decoded(packed))
        fails("test_renders_what_it_stores", fmt, (6, 70), weight, packed)
    with monkeypatch.context() as patch:  # decodes to something near, and rounds it elsewhere
        patch.setattr(Codes, "decode", lambda s, f, c, t, r: 1.01 * decode(s, f, c, t, r))
        fails("test_rounding_again_changes_nothing", *decoded(packed))
        fails("test_codes_and_scales_are_the_weight", fmt, (6, 70), weight, packed)
    with monkeypatch.context() as patch:
        patch.setattr(Codes, "render", lambda s, w, f, g, out: render(s, 2 * w, f, g, out))
        fails("test_renders_what_it_stores", fmt, (6, 70), weight, packed)
    with monkeypatch.context() as patch:
        patch.setattr(Integers, "examples", ("int4-g32", "int4_g32"))
        patch.setattr(Integers, "parse", lambda _self, text: replace(fmt, name=text))
        patch.setattr(formats, "_parsed", formats._parsed.__wrapped__)  # what is parsed is not kept
        fails("test_names_read_back", "integers")
    fit, refit = Integers.fit, Integers.refit
    with monkeypatch.context() as patch:  # what is important is what is not
        patch.setattr(
            Integers, "fit", lambda s, w, f, importance=None: fit(s, w, f, odds(importance))
        )
        fails("test_importance_is_no_worse_than_none", fmt)
    with monkeypatch.context() as patch:  # to another weight
        patch.setattr(Integers, "refit", lambda s, w, f, g, c, h: refit(s, 2 * w, f, g, c, h))
        fails("test_refitted_scales_cost_no_more", fmt)
    fails("test_traits_fit_together", replace(fmt, floating=True))
    fails("test_traits_fit_together", replace(fmt, levels=(0.0, 1.0)))
    wrong = PackedTensor.pack(3 * weight, fmt, family("integers").fit(3 * weight, fmt))
    fails("test_errors_are_those_of_its_bits", fmt, (6, 70), weight, wrong)


class Sites(SiteContract):
    plugins = ("conv",)

    def toy(self, name: str) -> LoadedModel:
        first, second = nn.Conv2d(3, 24, 2), nn.Conv2d(24, 8, 1)
        network = nn.Sequential(first, nn.Tanh(), second, nn.Flatten(2), nn.Linear(9, 5))
        return toy_of(network, [drawn((2, 3, 4, 4), seed) for seed in (1, 2)])


WRONG_SITES: dict[str, tuple[str, dict[str, Any]]] = {
    "a matrix with its rows mixed up": (
        "test_the_matrix_is_the_weight",
        {"matrix": lambda _s, _m, _a, weight: weight.flatten(1).flip(0)},
    ),
    "what another site takes, too": (
        "test_finds_its_weights",
        {"takes": lambda s, m, a, _w: a == "weight", "matrix": lambda _s, _m, _a, w: w.flatten(1)},
    ),
    "inputs of another position": (
        "test_factors_multiply_to_the_gradient",
        {"inputs": lambda s, m, x, n: Conv.inputs(s, m, x, n).roll(1, 1)},
    ),
    "the gradient of half the weight": (
        "test_factors_multiply_to_the_gradient",
        {"scale": lambda _s, _m: 0.5},
    ),
    "put back in another order": (
        "test_the_matrix_is_the_weight",
        {"restored": lambda _s, _m, _a, matrix, shape: matrix.reshape(shape).flip(0)},
    ),
}


@pytest.mark.parametrize("what", WRONG_SITES)
def test_sites(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test, methods = WRONG_SITES[what]
    SITES.get("conv")
    wrong = type("Wrong", (Conv,), methods)()
    monkeypatch.setitem(SITES._found, "conv", wrong)
    contract = Sites()
    model = contract.toy("conv")
    own = [place for place in places(model.module) if place.site_name == "conv"]
    names = {place.name for place in own}
    units = tuple(unit for unit in find_units(model.module) if unit.name in names)
    given = {"model": model, "own": own, "units": units}
    check = getattr(contract, test)
    wanted = [given[name] for name in inspect.signature(check).parameters if name != "name"]
    with pytest.raises(AssertionError):
        check("conv", *wanted)


def test_exporters(wide: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract, target = ExporterContract(), EXPORTERS.get("json")
    contract.test_a_configuration_tells_plans_apart("json", target(), wide, tmp_path)
    text = target.config
    monkeypatch.setattr(target, "config", lambda self, source: text(self, source)[:40])
    with pytest.raises(AssertionError):
        contract.test_a_configuration_tells_plans_apart("json", target(), wide, tmp_path)


def test_a_contract_about_no_plugin_is_an_error() -> None:
    class TestMine(SolverContract):
        """Forgot to say which."""

    with pytest.raises(ValueError, match="TestMine tests nothing: set plugins"):
        TestMine().pytest_generate_tests(None)  # type: ignore[arg-type]

"""The numbers of the figures and tables; see test_html.py for the files themselves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitplan.models.units import UnitInfo
from bitplan.quantizers.format import Format
from bitplan.reports.data import (
    MIXED,
    allocation_data,
    format_shares,
    frontier_data,
    prediction_data,
    reference_format,
    sensitivity_data,
    size_unit,
    unit_rows,
)
from bitplan.reports.prose import price_note
from bitplan.reports.run import RunData
from bitplan.reports.summary import best_uniform, comparison, facts
from bitplan.search.frontier import Frontier
from bitplan.search.hull import lower_hull
from bitplan.search.plan import BudgetRef, KVCache, Plan, Refinement, SequentialRounding, Tuning
from bitplan.search.problem import Problem
from bitplan.sensitivity.provenance import FoldRef, Provenance
from bitplan.tests.fakes import fake_run, fake_table, flat_units, transformer_units


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    units = transformer_units(3, embedding=True)
    return RunData.load(fake_run(tmp_path_factory.mktemp("run"), units))


def test_the_frontier_falls_and_touches_its_bound(run: RunData) -> None:
    data = frontier_data(run)
    assert (np.diff(data.frontier.megabytes) > 0).all()
    assert (np.diff(data.frontier.kl) <= 0).all()
    corners = np.searchsorted(data.bound.megabytes, data.frontier.megabytes)
    np.testing.assert_array_equal(data.bound.megabytes[corners], data.frontier.megabytes)
    np.testing.assert_array_equal(data.bound.kl[corners], data.frontier.kl)


def test_the_drawn_bound_is_that_of_the_relaxation(run: RunData) -> None:
    problem, bound = Problem.from_table(run.table), frontier_data(run).bound
    hull = lower_hull(problem)
    for megabytes, kl in list(zip(bound.megabytes, bound.kl, strict=True))[::20]:
        assert kl == pytest.approx(hull.relax(problem, round(1e6 * megabytes)).bound, rel=1e-9)
    steps = np.diff(bound.kl) / bound.kl[:-1]  # dense: on a log axis, too, it looks like itself
    assert np.diff(bound.megabytes).max() <= np.ptp(bound.megabytes) / 500
    assert (steps <= 0).all()


def test_sizes_are_megabytes_and_bits_per_weight(run: RunData) -> None:
    data = frontier_data(run)
    assert data.plan.megabytes == pytest.approx(run.plan.bytes / 1e6)
    assert data.plan.bpw == pytest.approx(run.plan.bpw)
    int4 = next(point for point in data.uniform if point.name == "int4-g64-asym")
    assert int4.bpw == pytest.approx(4.3125)
    assert int4.stderr is None
    assert data.budget_megabytes == pytest.approx(4.3 * run.table.weights / 8e6, rel=1e-6)


def test_measured_points_keep_their_errors(run: RunData) -> None:
    data = frontier_data(run)
    assert data.plan_measured is not None
    assert run.plan.measured is not None
    assert data.plan_measured.kl == run.plan.measured.kl
    assert data.plan_measured.stderr == run.plan.measured.kl_stderr
    assert [p.stderr for p in data.measured] == [b.kl_stderr for b in run.plan.baselines]


def test_an_unmeasured_plan_has_predictions_only(tmp_path: Path) -> None:
    data = frontier_data(RunData.load(fake_run(tmp_path, measured=False)))
    assert data.plan_measured is None
    assert data.measured == ()
    assert data.uniform


def test_checks_pair_predictions_with_measurements(run: RunData, tmp_path: Path) -> None:
    own, *others = prediction_data(run).checks
    assert run.plan.measured is not None
    assert (own.predicted, own.measured) == (run.plan.predicted_kl, run.plan.measured.kl)
    assert own.predicted_stderr == run.plan.predicted_kl_stderr
    assert [(c.name, c.predicted, c.measured, c.stderr) for c in others] == [
        (b.format, b.predicted_kl, b.kl, b.kl_stderr) for b in run.plan.baselines
    ]
    assert prediction_data(RunData.load(fake_run(tmp_path, measured=False))).checks == ()


def test_sizes_have_the_unit_they_read_well_in() -> None:
    assert size_unit(72.3) == ("MB", 1.0)
    assert size_unit(0.0534) == ("kB", 1e-3)
    assert size_unit(16_100) == ("GB", 1e3)


def test_allocation_counts_everything_stored(run: RunData) -> None:
    grid = allocation_data(run)
    assert grid.layers == (0, 1, 2)
    assert grid.kinds[0] == "self_attn.q_proj"
    assert grid.kinds[-1] == "mlp.down_proj"
    assert [unit.name for unit in grid.others] == ["model.embed_tokens"]
    name = run.plan.assignments["model.layers.2.mlp.up_proj"]
    row = grid.kinds.index("mlp.up_proj")
    assert grid.formats[row][2] == name
    stored = Format.parse(name).stored_bytes((1536, 576))
    assert grid.values[row, 2] == pytest.approx(8 * stored / (1536 * 576))


def test_units_without_layers_are_listed(tmp_path: Path) -> None:
    grid = allocation_data(RunData.load(fake_run(tmp_path, flat_units())))
    assert grid.layers == ()
    assert grid.kinds == ()
    assert [unit.name for unit in grid.others] == [unit.name for unit in flat_units()]


def test_experts_share_a_cell(tmp_path: Path) -> None:
    kind, shape = "mlp.experts.up", (64, 128)
    units = tuple(UnitInfo(f"l.0.e.{e}.up", (f"l.0.e.{e}.up",), (shape,), kind, 0) for e in (0, 1))
    run = RunData.load(fake_run(tmp_path, units, budget="3.9bpw"))
    first, second = (run.plan.assignments[unit.name] for unit in units)
    grid = allocation_data(run)
    assert grid.values.shape == (1, 1)
    assert grid.values[0, 0] == pytest.approx(8 * run.plan.bytes / run.plan.weights)
    assert grid.formats[0][0] == (first if first == second else MIXED)
    sensitivity = sensitivity_data(run)
    column = run.table.formats.index(sensitivity.format)
    assert sensitivity.kl.values[0, 0] == pytest.approx(run.table.kl[:, column].sum())


def test_a_missing_unit_leaves_a_hole(tmp_path: Path) -> None:
    units = transformer_units(2)[:-1]
    grid = allocation_data(RunData.load(fake_run(tmp_path, units)))
    assert np.isnan(grid.values[grid.kinds.index("mlp.down_proj"), 1])
    assert grid.formats[grid.kinds.index("mlp.down_proj")][1] == ""


def test_sensitivity_is_the_table_at_the_middle_format(run: RunData) -> None:
    data = sensitivity_data(run)
    assert data.format == "int4-g64-asym"
    column = run.table.formats.index(data.format)
    names = [unit.name for unit in run.table.units]
    index = names.index("model.layers.1.self_attn.k_proj")
    row = data.kl.kinds.index("self_attn.k_proj")
    assert data.kl.values[row, 1] == run.table.kl[index, column]
    millions = 192 * 576 / 1e6
    assert data.density.values[row, 1] == pytest.approx(run.table.kl[index, column] / millions)
    assert data.kl.others[0].stderr == run.table.stderr[0, column]


def test_the_reference_format_is_priced_everywhere() -> None:
    table = fake_table(transformer_units(1))
    table.kl[0, table.formats.index("int4-g64-asym")] = np.nan
    assert reference_format(table) == "int4-g128-asym"


def test_comparison_pairs_prediction_and_measurement(run: RunData) -> None:
    rows = comparison(run.plan, run.frontier.uniform)
    assert rows[0].kl == run.plan.measured.kl  # type: ignore[union-attr]
    assert [row.bytes for row in rows[1:]] == sorted(row.bytes for row in rows[1:])
    assert {row.name for row in rows[1:]} == {f"uniform {p.name}" for p in run.frontier.uniform}
    for row in rows[1:]:
        assert row.fits == (row.bytes <= run.plan.budget.bytes)
        assert (row.kl is not None) == row.fits


def test_the_best_uniform_fits_and_is_measured_first(run: RunData) -> None:
    rows = comparison(run.plan, run.frontier.uniform)
    rival = best_uniform(rows)
    assert rival is not None
    assert rival.name == "uniform int4-g128-asym"
    assert rival.kl == min(row.kl for row in rows if row.format and row.kl is not None)
    predicted = best_uniform([row._replace(kl=None) for row in rows])
    assert predicted is not None
    assert predicted.fits
    assert best_uniform([row for row in rows if not row.fits]) is None


def test_facts_say_what_was_not_measured(tmp_path: Path) -> None:
    plan = RunData.load(fake_run(tmp_path, measured=False)).plan
    lines = dict(facts(plan, comparison(plan)))
    assert lines["KL measured"] == "not measured"
    assert "best uniform" not in lines
    assert "perplexity" not in lines


def fact(plan: Plan, name: str) -> str:
    return dict(facts(plan, comparison(plan)))[name]


def with_cache(plan: Plan, bits: dict[int, int], rest: int = 0) -> Plan:
    """The plan with a cache of 12 MB, for 30 MB of memory of which the model takes ``rest``."""
    cache = KVCache(
        bits={f"model.layers.{layer}": width for layer, width in bits.items()},
        context=8192,
        batch=4,
        bytes=12_000_000,
        predicted_kl=0.01,
    )
    budget = BudgetRef(
        text="30MB of memory", bytes=30_000_000 - rest, kind="memory", memory=30_000_000
    )
    return plan.model_copy(update={"kv_cache": cache, "budget": budget})


def test_a_plan_that_counts_other_bytes_is_refused(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    plan = Plan.load(folder / "plan.json")
    plan.model_copy(update={"bytes": plan.bytes - 16}).save(folder / "plan.json")
    with pytest.raises(ValueError, match=f"{plan.bytes - 16:,} B where its formats take"):
        RunData.load(folder)


def test_facts_say_whose_bytes_are_counted(run: RunData) -> None:
    def runtime(name: str) -> str:
        return dict(facts(run.plan.model_copy(update={"runtime": name}), []))["runtime"]

    assert runtime("mlx").endswith("and counts the bytes it stores")
    assert runtime("torchao") == "keeps to what torchao can run"  # it packs by itself


def test_facts_of_a_plan_with_a_cache(run: RunData) -> None:
    plan = with_cache(run.plan, {0: 8, 1: 4, 2: 8}, rest=5_000_000)
    lines = dict(facts(plan, comparison(plan, run.frontier.uniform)))
    assert lines["KV cache"] == "8 bits in 2 layers, 4 bits in 1; 12.0 MB at 8,192 tokens × 4"
    weights = plan.bytes / 1e6
    assert lines["memory"] == (
        f"30.0 MB asked, {weights + 17:.1f} MB used: weights {weights:.1f} MB, KV cache 12.0 MB, "
        "rest of the model 5.0 MB"
    )
    assert "size" not in lines
    assert lines["bits per weight"] == f"{8 * plan.bytes / plan.weights:.3f}"


def test_a_cache_of_one_width_and_an_unknown_memory(run: RunData) -> None:
    plan = with_cache(run.plan, dict.fromkeys(range(3), 4))
    assert fact(plan, "KV cache").startswith("4 bits in all 3 layers; ")
    plan.budget.memory = None
    weights = plan.bytes / 1e6
    assert fact(plan, "memory") == (
        f"{weights + 12:.1f} MB used: weights {weights:.1f} MB, KV cache 12.0 MB"
    )


def test_plans_with_caches_are_compared_in_total_bytes(run: RunData) -> None:
    plan = with_cache(run.plan, {0: 8})
    own, *rivals = comparison(plan, run.frontier.uniform)
    assert own.bytes == plan.bytes + 12_000_000
    assert own.bpw == pytest.approx(8 * plan.bytes / plan.weights)
    assert len(rivals) == len(plan.baselines)  # uniform weights alone are no rivals
    assert all(np.isnan(row.bpw) for row in rivals)


def test_a_refined_plan_is_not_called_far_from_optimal(run: RunData) -> None:
    refined = Refinement(steps=2, kl_before=0.868, kl_after=0.6803)
    plan = run.plan.model_copy(update={"gap": 0.4, "lower_bound_kl": 0.6, "refinement": refined})
    assert fact(plan, "refined") == "2 steps: KL on calibration sequences 0.868 → 0.680"
    assert fact(plan, "optimality").startswith("does not apply: refined by measured KL")
    assert "0.600" in fact(plan, "optimality")
    assert "%" not in fact(plan, "optimality")
    assert fact(plan, "KL predicted").endswith("one shot")
    one = run.plan.model_copy(update={"refinement": refined.model_copy(update={"steps": 1})})
    assert fact(one, "refined").startswith("1 step: ")


def test_a_plan_that_was_rounded_again_says_so(run: RunData) -> None:
    note = SequentialRounding(matrices=14, kl_before=0.4, kl_after=0.3612, sha256="ab")
    plan = run.plan.model_copy(update={"sequential": note})
    assert fact(plan, "rounded again") == (
        "14 matrices, block by block: KL on calibration sequences 0.400 → 0.361"
    )
    assert fact(plan, "KL predicted").endswith("as rounded first")
    assert "as first rounded" in price_note(plan)
    assert "rounded again" not in dict(facts(run.plan, comparison(run.plan)))


def test_a_folded_plan_says_so(run: RunData) -> None:
    fold = FoldRef(method="awq", count=120, sha256="ab", model_sha256="cd")
    plan = run.plan.model_copy(update={"fold": fold})
    assert fact(plan, "folded") == "scales (awq) into 120 norms and layers, before all prices"
    one = run.plan.model_copy(update={"fold": fold.model_copy(update={"count": 1})})
    assert fact(one, "folded").startswith("scales (awq) into 1 norm or layer,")
    assert "folded" not in dict(facts(run.plan, comparison(run.plan)))


def test_a_tuned_plan_says_so(run: RunData) -> None:
    tuned = Tuning(steps=24, tokens=512, kl_before=0.4, kl_after=0.3412, sha256="ab")
    plan = run.plan.model_copy(update={"tuning": tuned})
    assert fact(plan, "tuned") == "scales: KL on calibration sequences 0.400 → 0.341 in 24 steps"
    assert fact(plan, "KL predicted").endswith("before tuning")
    assert "before tuning" in price_note(plan)
    one = run.plan.model_copy(update={"tuning": tuned.model_copy(update={"steps": 1})})
    assert fact(one, "tuned").endswith(" in 1 step")
    assert "tuned" not in dict(facts(run.plan, comparison(run.plan)))


def test_a_gap_is_that_of_predictions(run: RunData) -> None:
    for gap, words in {
        0.12: "at most 12 % from optimal, by predicted KL",
        0.0: "proven optimal",
        1.0: "no proof of optimality",
    }.items():
        assert fact(run.plan.model_copy(update={"gap": gap}), "optimality") == words


def test_targets_runtimes_and_notes_are_named(run: RunData) -> None:
    names = dict(facts(run.plan, comparison(run.plan)))
    assert not {"runtime", "solver note", "KV cache", "memory", "refined"} & names.keys()
    budget = run.plan.budget.model_copy(update={"text": "KL <= 0.1", "kind": "target"})
    more = {"budget": budget, "runtime": "vllm", "note": "5 plans measured."}
    plan = run.plan.model_copy(update=more)
    assert fact(plan, "bits per weight").endswith(" (target KL <= 0.1)")
    assert fact(plan, "runtime") == "keeps to what vllm can run, and counts the bytes it stores"
    assert fact(plan, "solver note") == "5 plans measured."


def test_shares_and_rows_add_up(run: RunData) -> None:
    shares, rows = format_shares(run), unit_rows(run)
    assert sum(share.weights for share in shares) == pytest.approx(1)
    assert sum(share.bytes for share in shares) == pytest.approx(1)
    assert sum(share.units for share in shares) == len(run.table.units) == len(rows)
    assert sum(row.bytes for row in rows) == run.plan.bytes
    assert sum(row.kl or 0 for row in rows) == pytest.approx(run.plan.predicted_kl)


def test_plan_and_profile_of_different_runs_are_refused(tmp_path: Path) -> None:
    fake_run(tmp_path, transformer_units(2))
    fake_table(transformer_units(3)).save(tmp_path / "profile.safetensors")
    with pytest.raises(ValueError, match=r"^plan\.json .*no format for 'model\.layers\.2\."):
        RunData.load(tmp_path)


def test_a_plan_for_another_model_is_refused(run: RunData) -> None:
    model = run.plan.model.model_copy(update={"sha256": "0ther"})
    with pytest.raises(ValueError, match=r"^plan\.json .*model 0ther\. Run the search again"):
        replace(run, plan=run.plan.model_copy(update={"model": model}))
    table = replace(run.table, provenance=Provenance())
    with pytest.raises(ValueError, match=r"^plan\.json .*model 5af571cb"):
        replace(run, table=table)


def test_a_frontier_of_another_model_or_profile_is_refused(run: RunData) -> None:
    def check(frontier: Frontier, message: str) -> None:
        with pytest.raises(ValueError, match=rf"^frontier\.json .*{message}.*Run the search again"):
            replace(run, frontier=frontier)

    model = run.plan.model.model_copy(update={"sha256": "0ther"})
    check(replace(run.frontier, model=model), "model 0ther")
    check(replace(run.frontier, units=run.frontier.units[1:]), "other units")
    check(replace(run.frontier, formats=("bf16", "int4-gc")), "formats are bf16, int4-gc")
    replace(run, frontier=replace(run.frontier, model=None))  # a frontier need not say

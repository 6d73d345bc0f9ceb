"""bitplan compare: what changed between two plans, and what cannot be compared."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bitplan.jobs.settings import SearchSettings
from bitplan.models.coverage import Coverage
from bitplan.quantizers.format import Format
from bitplan.reports.compare import compare
from bitplan.reports.compared import (
    bytes_change,
    change_map,
    headline,
    kind_rows,
    largest_changes,
    print_comparison,
    render_comparison,
    rows,
    write_comparison,
)
from bitplan.search.plan import Plan, plan_key
from bitplan.sensitivity.table import SensitivityTable
from bitplan.tests.fakes import fake_run, flat_units


def write_measurements(folder: Path, kl: np.ndarray, text: str = "ab") -> None:
    key = plan_key(Plan.load(folder / "plan.json"))
    entry = {"kl": kl.tolist(), "nll": None, "tokens": 2048}
    data = {"text_sha256": text, "ppl_original": None, "plans": {key: entry}}
    (folder / "measurements.json").write_text(json.dumps(data))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return fake_run(tmp_path / "a"), fake_run(tmp_path / "b", budget="3.4bpw")


def test_bytes_and_prices_of_the_changes_add_up(pair: tuple[Path, Path]) -> None:
    found = compare(*pair)
    a, b = found.first.plan, found.second.plan
    assert len(found.changes) == sum(a.assignments[m] != b.assignments[m] for m in a.assignments)
    assert sum(c.bytes or 0 for c in found.changes) == b.bytes - a.bytes
    predicted = sum(c.kl or 0.0 for c in found.changes)
    assert predicted == pytest.approx(b.predicted_kl - a.predicted_kl)
    assert sum(row.changed for row in kind_rows(found)) == len(found.changes)
    assert sum(row.bytes or 0 for row in kind_rows(found)) == b.bytes - a.bytes
    gains = [abs(c.kl or 0) for c in largest_changes(found)]
    assert gains == sorted(gains, reverse=True)


def test_turned_round_every_change_has_the_other_sign(pair: tuple[Path, Path]) -> None:
    there, back = compare(*pair), compare(*reversed(pair))
    assert [-(c.bytes or 0) for c in there.changes] == [c.bytes for c in back.changes]
    assert [-c.bits for c in there.changes] == [c.bits for c in back.changes]


def test_plans_for_two_runtimes_count_their_own_bytes(tmp_path: Path) -> None:
    formats = ("int3-g32", "int4-g64", "int6-g64")
    runs = [
        fake_run(
            tmp_path / name,
            formats=formats,
            search=SearchSettings(budget="4.8bpw", runtime=runtime),
        )
        for name, runtime in (("ours", None), ("theirs", "mlx"))
    ]
    found = compare(*runs)
    shown = {row.name: row for row in rows(found)}
    assert found.second.plan.runtime == "mlx"
    assert (found.first.size, found.second.size) == tuple(
        Plan.load(run / "plan.json").bytes for run in runs
    )
    assert shown["bytes"][1:3] == ("as bitplan stores it", "as mlx stores it")
    assert "edited" not in shown
    same = {row.name for row in rows(compare(runs[1], runs[1]))}
    assert "bytes" not in same


def test_a_plan_and_itself(pair: tuple[Path, Path]) -> None:
    found = compare(pair[0], pair[0] / "plan.json")
    assert found.changes == ()
    assert headline(found) == "Both plans give all 21 modules the same format."
    assert {row.change for row in rows(found)} <= {"", "±0 B", "+0.000", "0", "the same tokens"}


def test_plans_of_different_models_are_refused(pair: tuple[Path, Path]) -> None:
    plan = Plan.load(pair[1] / "plan.json")
    plan.model.sha256, plan.model.id = "f" * 64, "other/model"
    plan.save(pair[1] / "plan.json")
    with pytest.raises(ValueError, match=r"other/model \(sha256 ffffffffffff\). Only plans of one"):
        compare(*pair)


def test_plans_without_a_common_module_are_refused(pair: tuple[Path, Path]) -> None:
    plan = Plan.load(pair[1] / "plan.json")
    plan.assignments = {"elsewhere": "int4-g64-asym"}
    plan.save(pair[1] / "plan.json")
    with pytest.raises(ValueError, match=r"no module in common.*'elsewhere'"):
        compare(*pair)


def test_plans_of_different_parts_say_so(pair: tuple[Path, Path]) -> None:
    plan = Plan.load(pair[1] / "plan.json")
    plan.assignments.pop("model.layers.0.mlp.up_proj")
    plan.save(pair[1] / "plan.json")
    found = compare(*pair)
    (row,) = (row for row in rows(found) if row.name == "modules")
    assert row[1:] == ("20 and 1 only here", "20 and 0 only here", "sizes are of different parts")
    assert "model.layers.0.mlp.up_proj" not in {change.module for change in found.changes}


def test_a_folder_without_a_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no plan\.json"):
        compare(tmp_path, tmp_path)


def test_measured_kl_is_paired_on_the_same_text_only(pair: tuple[Path, Path]) -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.1, 16)
    write_measurements(pair[0], 0.3 + noise)
    write_measurements(pair[1], 0.5 + noise + random.normal(0, 0.001, 16))
    paired = compare(*pair).paired
    assert paired is not None
    assert paired[0] == pytest.approx(0.2, abs=0.001)
    assert paired[1] < 0.001  # the noise they share is gone
    write_measurements(pair[1], 0.5 + noise, text="cd")
    assert compare(*pair).paired is None


def test_other_held_out_text_is_not_comparable(pair: tuple[Path, Path]) -> None:
    plan = Plan.load(pair[1] / "plan.json")
    assert plan.measured is not None
    plan.measured.text_sha256 = "0" * 64
    plan.save(pair[1] / "plan.json")
    change = {row.name: row.change for row in rows(compare(*pair))}
    assert change["measured on"] == "not the same: not comparable"
    assert change["KL measured"] == ""


def test_without_a_profile_bits_are_compared(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        (folder / "profile.safetensors").unlink()
    found = compare(*pair)
    assert found.changes
    assert all(c.bytes is None and c.kl is None for c in found.changes)
    assert change_map(found) == ([], {})
    with pytest.raises(ValueError, match="no map to draw"):
        write_comparison(found, pair[0] / "map.png")
    assert "Every change" in render_comparison(found)


def test_packed_folders_know_the_shapes(pair: tuple[Path, Path]) -> None:
    from safetensors.numpy import save_file

    table = SensitivityTable.load(pair[0] / "profile.safetensors")
    plan = Plan.load(pair[0] / "plan.json")
    modules = {
        unit.name: {"format": plan.assignments[unit.name], "shape": list(unit.shapes[0])}
        for unit in table.units
    }
    for folder in pair:
        (folder / "profile.safetensors").unlink()
    header = {"bitplan": json.dumps({"modules": modules, "header": {}})}
    save_file({"x": np.zeros(1)}, pair[0] / "model.safetensors", metadata=header)
    found = compare(*pair)
    first = found.changes[0]
    shape = next(unit.shapes[0] for unit in table.units if unit.name == first.module)
    sizes = [Format.parse(name).stored_bytes(shape) for name in (first.before, first.after)]
    assert first.bytes == sizes[1] - sizes[0]


def test_the_map_has_a_cell_for_every_change(pair: tuple[Path, Path]) -> None:
    found = compare(*pair)
    layers, cells = change_map(found)
    assert layers == [0, 1, 2]
    filled = sum(cell is not None for line in cells.values() for cell in line)
    assert filled == len(found.changes)
    cell = next(cell for line in cells.values() for cell in line if cell)
    assert " → " in cell.words


def test_the_terminal_fits_eighty_columns(pair: tuple[Path, Path]) -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        print_comparison(console, compare(*pair))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "of 21 modules change their format" in text


def test_files_by_their_ending(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(*pair)
    (page,) = write_comparison(found, tmp_path / "c.html")
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    for change in found.changes:
        assert f'<th scope="row">{change.module}</th>' in text
    png, svg = write_comparison(found, tmp_path / "c.svg")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in svg.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"ends in \.html, \.png or \.svg"):
        write_comparison(found, tmp_path / "c.pdf")


def test_models_without_layers_are_compared(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", flat_units(), budget="4.6bpw")
    b = fake_run(tmp_path / "b", flat_units(), budget="6bpw")
    found = compare(a, b)
    assert found.changes
    assert change_map(found)[0] == []
    assert "Where bits moved" not in render_comparison(found)


def test_a_plan_that_does_not_say_its_weights_can_be_compared(pair: tuple[Path, Path]) -> None:
    first, second = pair
    plan = Plan.load(second / "plan.json")
    unknown = plan.model.model_copy(update={"id": "theirs.gguf", "sha256": ""})
    imported = second.parent / "imported.json"
    plan.model_copy(update={"model": unknown}).save(imported)
    assert compare(first, imported).changes == compare(first, second).changes
    foreign = {"model": unknown, "predicted_kl": math.nan, "predicted_kl_stderr": math.nan}
    plan.model_copy(update=foreign).save(imported)
    predicted = next(row for row in rows(compare(first, imported)) if row.name == "KL predicted")
    assert predicted.second == "not predicted" and predicted.change == ""
    other = plan.model.model_copy(update={"sha256": "0" * 64})
    plan.model_copy(update={"model": other}).save(imported)
    with pytest.raises(ValueError, match="Only plans of one model"):
        compare(first, imported)


@pytest.mark.parametrize("beside", [True, False], ids=["in the run", "elsewhere"])
def test_a_plan_changed_by_hand_is_noticed(
    pair: tuple[Path, Path], tmp_path: Path, beside: bool
) -> None:
    plan = Plan.load(pair[0] / "plan.json")
    module = "model.layers.0.mlp.up_proj"
    wider = "int6-g64" if Format.parse(plan.assignments[module]).bits == 8 else "int8-g64"
    more = Format.parse(wider).stored_bytes((1536, 576))
    more -= Format.parse(plan.assignments[module]).stored_bytes((1536, 576))
    plan.assignments[module] = wider
    edited = pair[1] / "plan.json" if beside else tmp_path / "mine.json"
    plan.save(edited)
    found = compare(pair[0], edited)
    shown = {row.name: row for row in rows(found)}
    assert found.second.size == plan.bytes + more
    assert shown["size"].change == bytes_change(more) != bytes_change(0)
    assert shown["edited"].first == ""
    assert f"says {plan.bytes:,} B, but its assignments take" in shown["edited"].second


def test_plans_as_they_were_made_are_not_called_edited(pair: tuple[Path, Path]) -> None:
    assert "edited" not in {row.name for row in rows(compare(*pair))}


def test_the_whole_model_and_what_is_planned_of_it_lead(pair: tuple[Path, Path]) -> None:
    for run in pair:
        plan = Plan.load(run / "plan.json")
        known = {
            "model_bytes": plan.bytes + 1000,
            "coverage": Coverage(plan.weights, 2 * plan.weights, selected=True),
        }
        plan.model_copy(update=known).save(run / "plan.json")
    shown = {row.name: row for row in rows(compare(*pair))}
    assert list(shown)[:3] == ["whole model", "planned of it", "size"]
    assert shown["whole model"].change == shown["size"].change != bytes_change(0)
    assert shown["planned of it"][1:] == ("50.0 %", "50.0 %", "")

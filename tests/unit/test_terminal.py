"""What `bitplan search` prints at the end."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from bitplan.reports.terminal import print_summary, uniform_table
from bitplan.search.plan import Plan
from bitplan.tests.fakes import fake_run, transformer_units


def shown(plan: Plan, files: dict[str, Path], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        print_summary(console, plan, files)
    return capture.get()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    fake_run(tmp_path, transformer_units(30))
    return Plan.load(tmp_path / "plan.json")


def test_summary_has_every_number(plan: Plan) -> None:
    folder = Path("runs/demo")
    text = shown(plan, {"plan": folder / "plan.json", "report": folder / "report.html"}, width=120)
    assert plan.measured is not None
    assert "212.3 MB at 16 bits → 57.1 MB (26.9 %)" in text
    assert "4.300 (budget 4.3bpw)" in text
    assert f"{plan.predicted_kl:.3f} ±" in text
    assert f"{plan.measured.kl:.3f} ±" in text
    assert "16,384 held-out tokens" in text
    assert "optimal" in text
    assert "int4-g128-asym, 55.3 MB: KL 0." in text
    assert "(original 30.5)" in text
    assert "runs/demo/  plan.json  report.html" in text


def test_unmeasured_plan(tmp_path: Path) -> None:
    fake_run(tmp_path, measured=False)
    text = shown(Plan.load(tmp_path / "plan.json"), {})
    assert "not measured" in text
    assert "Measured on the same tokens" not in text


def test_eighty_columns_are_enough(plan: Plan) -> None:
    text = shown(plan, {"plan": Path("runs") / ("long" * 30) / "plan.json"})
    assert max(map(len, text.splitlines())) <= 80
    for baseline in plan.baselines:  # no name is folded
        assert f"\n{baseline.name.removeprefix('uniform ')} " in text
    assert "long" * 30 in "".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("error", [0.0123, 0.02])
def test_eighty_columns_are_enough_for_every_size_of_kl(plan: Plan, error: float) -> None:
    assert plan.measured is not None
    plan.measured.kl, plan.measured.kl_stderr = 1e-6, error * 1e-6
    for baseline, kl in zip(plan.baselines, [1e-6, 1e-4, 1e-3, 1e-1, 10], strict=True):
        baseline.predicted_kl, baseline.kl, baseline.kl_stderr = 1.234 * kl, kl, error * kl
        baseline.difference, baseline.difference_stderr = kl - 1e-6, error * kl
        baseline.ppl, baseline.bytes = 30.5 * math.exp(kl), 10 * baseline.bytes
    text = shown(plan, {})
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for name in [*(b.name.removeprefix("uniform ") for b in plan.baselines), "this plan"]:
        assert f"\n{name} " in text
    for end in ["30.5", "33.7", "672000"]:  # perplexity, the last column
        assert f" {end}\n" in text


def test_names_stay_whole_in_a_narrow_terminal(plan: Plan) -> None:
    assert "\nint4-g128-asym " in shown(plan, {}, width=60)


def test_the_table_is_sorted_by_size_and_marks_the_plan(plan: Plan) -> None:
    table = uniform_table(plan)
    names = list(table.columns[0].cells)
    assert [str(name) for name in names][-1] == "this plan"  # the baselines fit its budget
    assert len(names) == len(plan.baselines) + 1
    assert table.rows[-1].style == "bold green"


def test_markup_in_names_is_text(plan: Plan) -> None:
    plan.model.id = "[bold]odd[/bold]"
    plan.budget.text = "[/b]4bpw"
    text = shown(plan, {"plan": Path("runs/[/x]/[red]/plan.json")})
    assert "Plan for [bold]odd[/bold]" in text
    assert "(budget [/b]4bpw)" in text
    assert "runs/[/x]/[red]/  plan.json" in text

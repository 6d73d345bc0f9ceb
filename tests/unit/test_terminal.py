"""What `bitplan search` prints at the end."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from bitplan._base.registry import Registry
from bitplan.jobs.listing import JobInfo
from bitplan.quantizers.format import families
from bitplan.reports.terminal import (
    families_table,
    jobs_table,
    plugins_table,
    print_summary,
    uniform_table,
)
from bitplan.reports.words import plain
from bitplan.search.plan import BudgetRef, KVCache, Latency, MeasuredAlso, Plan
from bitplan.search.solvers import SOLVERS
from bitplan.sensitivity.metrics import METRICS
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


def test_what_does_not_fit_says_so_in_words(plan: Plan) -> None:
    """Colour alone says nothing in a log, or to everyone."""
    larger = plan.baselines[-1].model_copy(
        update={"name": "uniform int8-gc", "format": "int8-gc", "bytes": 1 << 30}
    )
    plan = plan.model_copy(update={"baselines": [*plan.baselines, larger]})
    assert re.search(r"\nint8-gc .*\n\(over budget\) *\n", shown(plan, {}) + "\n")
    assert shown(plan, {}).count("(over budget)") == 1
    asked = plan.budget.model_copy(update={"text": "KL <= 0.1", "kind": "target"})
    assert "(larger)" in shown(plan.model_copy(update={"budget": asked}), {})
    latency = Latency(ms=1.0, tokens=1, device="h100", sureness="assumed", max_ms=1.0)
    plan.baselines[0].ms = 1.5
    slow = shown(plan.model_copy(update={"latency": latency}), {})
    assert slow.count("(too slow)") == 1 and slow.count("(over budget)") == 1


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


def test_a_plan_with_a_cache_fits_eighty_columns(plan: Plan) -> None:
    for baseline in plan.baselines:
        baseline.format = f"{baseline.format} + kv16"
        baseline.bytes += 700_000_000
    bits = {f"model.layers.{i}": 16 if i == 3 else 8 for i in range(30)}
    plan.kv_cache = KVCache(bits=bits, context=8192, batch=4, bytes=12_000_000, predicted_kl=0.01)
    plan.budget = BudgetRef(
        text="1GiB of memory", bytes=plan.budget.bytes, kind="memory", memory=1 << 30
    )
    text = shown(plan, {})
    assert max(map(len, text.splitlines())) <= 80
    assert "16 bits in 1 layers" not in text
    assert "KV cache          16 bits in 1 layer, 8 bits in 29; 12.0 MB at 8,192 tokens" in text
    assert " bpw " not in text
    for baseline in plan.baselines:  # no name is folded
        assert f"\n{baseline.format} " in text
    assert "\nthis plan " in text
    assert "69.1 MB" in text  # weights and cache


def job(folder: str = "runs/tiny", **values: object) -> JobInfo:
    blank = dict.fromkeys(JobInfo.__dataclass_fields__)
    given = {"folder": Path(folder), "status": "running", "doing": "", "done": 0, "total": 0}
    return JobInfo(**{**blank, **given, **values})  # type: ignore[arg-type]


def printed(table: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_long_error_is_wrapped_and_hides_neither_run_nor_status() -> None:
    error = "There is no text file of that name, and so on for much longer than a line is wide."
    text = printed(jobs_table([job("runs/a", status="failed", error=error)]))
    first = text.splitlines()[2]
    assert first.split()[:2] == ["runs/a", "failed"]
    assert " ".join(text.split()).endswith(" ".join(error.split()))
    assert max(map(len, text.splitlines())) <= 80


def test_jobs_say_how_far_they_are_or_what_they_found() -> None:
    jobs = [
        job("runs/a", doing="Profiling (fisher)", done=24, total=96, eta=40.0),
        job("runs/b", status="interrupted", doing="Validating 5 plans", done=1, total=4, eta=9.0),
        job("runs/c", status="done", doing="Bootstrap", budget="4.3bpw", bpw=4.2996, kl=0.18034),
        job("runs/d", status="failed", stage="refine"),
        job("runs/e", status="done"),
        job("runs/f", status="failed", error="No text file"),
        job("runs/g", status="failed", stage="solve", error="No plan"),
    ]
    lines = [" ".join(line.split()) for line in printed(jobs_table(jobs)).splitlines()[2:]]
    assert lines == [
        "runs/a running Profiling (fisher) 24/96, 0:40 left",
        "runs/b interrupted Validating 5 plans 1/4",
        "runs/c done 4.3bpw: 4.300 bpw, KL 0.180",
        "runs/d failed refine",
        "runs/e done",
        "runs/f failed No text file",
        "runs/g failed solve: No plan",
    ]


def test_jobs_in_long_folders_stay_readable() -> None:
    name = "runs/experiments/" + "a-model-with-a-very-long-name-" * 3 + "4.3bpw"
    table = jobs_table([job(name, doing="Profiling (fisher)", done=1, total=96, eta=3725.0)])
    lines = printed(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert "running  Profiling (fisher) 1/96, 1:02:05 left" in lines[2]
    assert "".join(line.split()[0] for line in lines[2:]) == name


def test_solvers_name_the_first_paper() -> None:
    table = plugins_table(SOLVERS)
    papers = dict(zip(table.columns[0].cells, table.columns[2].cells, strict=True))
    assert papers["greedy"] == "Fox (1966)"
    assert papers["random"] == "Li and Talwalkar (2019)"
    assert papers["bisection"] == "Burden and Faires"  # the year that follows is of another one


@pytest.mark.parametrize("registry", [METRICS, SOLVERS])
def test_lists_are_plain_text(registry: Registry[object]) -> None:
    """Docstrings are written for Sphinx; a terminal shows no backticks, roles or formulas."""
    for column in plugins_table(registry).columns:
        for cell in column.cells:
            assert not re.search(r"`|:\w+:|[_^]\w|\|\||<.*>", str(cell)) or cell in registry.names()


def test_markup_of_plugins_is_taken_out() -> None:
    """Also that of plugins which others wrote."""

    def plugin() -> None:
        """Like ``ilp``, see :class:`~other.Solver` and [1].

        References:
            The ``other`` package, its manual.
        """

    class One(Registry[object]):
        def names(self) -> list[str]:
            return ["theirs"]

        def get(self, name: str) -> object:
            return plugin

    cells = [next(iter(c.cells)) for c in plugins_table(One("solver", "bitplan.reports")).columns]
    assert cells == ["theirs", "Like ilp, see other.Solver and [1].", "The other package"]


DOCS = Path(__file__).parents[2] / "docs"


def test_the_documentation_lists_what_the_commands_list() -> None:
    """docs/search.md repeats `bitplan solvers`; docs/metrics.md names all of `bitplan metrics`."""
    rows = [line.split(" | ") for line in (DOCS / "search.md").read_text("utf-8").splitlines()]
    table = plugins_table(SOLVERS)
    for name, what, source in zip(*(column.cells for column in table.columns), strict=True):
        (row,) = (row for row in rows if row[0] == f"| `{name}`")
        assert plain(row[1]) == str(what)
        assert row[3] == f"{source or '–'} |"
    metrics = (DOCS / "metrics.md").read_text("utf-8")
    assert [name for name in METRICS.names() if f"| `{name}` " not in metrics] == []


@pytest.mark.parametrize("width", [80, 300])
def test_families_are_listed_with_their_whole_grammar(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(families_table())
    assert "…" not in capture.get()
    for family in families() if width == 300 else ():
        assert family.grammar in capture.get()


def test_a_second_text_is_told_with_the_rival_there(plan: Plan) -> None:
    assert plan.measured is not None
    alone = MeasuredAlso(
        kl=0.31, kl_stderr=0.02, tokens=4096, length=128, text="code", text_sha256="ab"
    )
    rival = {"rival": "int4-g128-asym", "rival_kl": 0.4, "rival_kl_stderr": 0.03}
    paired = {"difference": 0.09, "difference_stderr": 0.01}
    also = alone.model_copy(update=rival | paired)
    assert "KL on another text" not in shown(plan, {})
    text = " ".join(shown(plan.model_copy(update={"measured_also": [also]}), {}, 200).split())
    assert (
        "KL on another text 0.31 ± 0.02 nats per token on 4,096 held-out tokens of code; "
        "int4-g128-asym there: KL 0.40 ± 0.03, paired difference +0.090 ± 0.010" in text
    )
    text = shown(plan.model_copy(update={"measured_also": [alone]}), {}, 200)
    assert "tokens of code" in text and "there: KL" not in text

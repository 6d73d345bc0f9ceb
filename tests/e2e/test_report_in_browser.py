"""The report and the page of runs in a real browser: no errors, and all does what it says."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bitplan.jobs.job import Job
from bitplan.jobs.settings import SearchSettings
from bitplan.reports.html import write_report
from bitplan.reports.run import RunData
from bitplan.reports.serve import make_server
from bitplan.reports.words import number, with_error
from bitplan.search.frontier import Frontier
from bitplan.tests.browser import Browser, chromium, missing
from bitplan.tests.fakes import fake_run, flat_units, transformer_units

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

A11Y = (Path(__file__).parents[1] / "accessibility.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    bans = {"*q_proj": ("int2*",)}
    search = SearchSettings(budget="4.3bpw", bans=bans)
    fake_run(folder, transformer_units(6, embedding=True), search=search, confidence=True)
    write_report(folder)
    return folder


@pytest.fixture
def page(browser: Browser, run: Path) -> Browser:
    browser.open(run / "report.html")
    return browser


def faults(browser: Browser) -> list[str]:
    found: list[str] = browser.run(A11Y)
    return found


def readout(browser: Browser) -> str:
    return browser.text("#readout")


def press(browser: Browser, selector: str, key: str) -> None:
    from selenium.webdriver.common.keys import Keys

    element = browser.driver.find_element("css selector", selector)
    element.send_keys(getattr(Keys, key))


def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_errors_fits_and_is_accessible(
    browser: Browser, run: Path, width: int, scheme: str
) -> None:
    browser.open(run / "report.html", width, prefers_color_scheme=scheme)
    assert browser.log() == []
    assert browser.run("return document.documentElement.scrollWidth") == width
    assert faults(browser) == []


def test_the_check_of_accessibility_finds_faults(page: Browser) -> None:
    """Negative control."""
    page.run(
        "document.querySelector('#budget').removeAttribute('id');"
        "document.querySelector('h1').style.color = '#ccc';"
        "document.querySelector('.dock').insertAdjacentHTML('beforeend', '<button></button>');"
    )
    found = " ".join(faults(page))
    assert "contrast" in found
    assert "no name" in found


def test_the_page_shows_the_plan_first(page: Browser, run: Path) -> None:
    plan = RunData.load(run).plan
    assert f"{plan.bpw:.2f} bits per weight" in readout(page)
    assert number(plan.predicted_kl) in readout(page)
    assert plan.measured is not None
    assert with_error(plan.measured.kl, plan.measured.kl_stderr) in readout(page)
    assert page.text("#which") == "This plan"


def test_the_slider_shows_the_frontier_plan_by_plan(page: Browser, run: Path) -> None:
    frontier = Frontier.load(run / "frontier.json")
    start = page.run("return lastWithin(STOP_BYTES, state.bytes)")
    press(page, "#budget", "ARROW_RIGHT")
    press(page, "#budget", "ARROW_RIGHT")
    assert page.run("return state.stop") == start + 2
    stop = page.run("return STOPS[state.stop]")
    assert f"{8 * frontier.bytes[stop] / frontier.weights:.2f} bits per weight" in readout(page)
    expected = frontier.at(int(frontier.bytes[stop]))
    np.testing.assert_array_equal(page.run("return [...state.choice]"), expected)
    cell = page.run(
        "return [...document.querySelectorAll('#allocation-chart .cell')]"
        ".map(c => c.getAttribute('aria-label'))"
    )
    unit = int(np.flatnonzero([name.startswith("model.layers") for name in frontier.units])[0])
    assert frontier.formats[expected[unit]] in next(c for c in cell if frontier.units[unit] in c)
    assert page.run("return document.querySelector('#budget').ariaValueText || "
                    "document.querySelector('#budget').getAttribute('aria-valuetext')")  # fmt: skip
    page.run("document.querySelector('#reset').click()")
    assert page.text("#which") == "This plan"
    assert page.log() == []


def test_the_ends_of_the_slider(page: Browser) -> None:
    press(page, "#budget", "HOME")
    assert page.run("return state.stop") == 0
    press(page, "#budget", "ARROW_LEFT")
    assert page.run("return state.stop") == 0
    press(page, "#budget", "END")
    assert page.run("return state.stop === LAST_SEEN")
    assert page.run("return Number(document.querySelector('#budget').value)") == 1000


def test_hovering_the_chart_names_the_plan_there(page: Browser) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    pad = page.driver.find_element("css selector", "#frontier-chart .pad")
    page.run("arguments[0].scrollIntoView({block: 'center'})", pad)
    corner = pad.size["width"] // 3, -pad.size["height"] // 3  # up and right of all points
    ActionChains(page.driver).move_to_element_with_offset(pad, *corner).perform()
    eventually(lambda: "Optimal at" in page.text("#tip"), 5)
    assert not page.run("return document.querySelector('#tip').hidden")
    assert page.run("return state.stop") == -1  # looking changes nothing
    ActionChains(page.driver).move_to_element_with_offset(pad, *corner).click().perform()
    assert page.run("return state.stop") >= 0
    assert "Optimal plan" in page.text("#which")


def test_arrow_keys_read_out_the_points(page: Browser, run: Path) -> None:
    labels = page.run(
        "const marks = [...document.querySelectorAll('#frontier-chart .point')];"
        "marks.find(m => m.getAttribute('tabindex') === '0').focus();"
        "return marks.map(m => m.getAttribute('aria-label'))"
    )
    first = page.run("return document.activeElement.getAttribute('aria-label')")
    press(page, "#frontier-chart .point:focus", "ARROW_RIGHT")
    second = page.run("return document.activeElement.getAttribute('aria-label')")
    assert first != second
    assert {first, second} <= set(labels)
    reachable = "return document.querySelectorAll('#frontier-chart [tabindex=\"0\"]').length"
    assert page.run(reachable) == 1
    measured = RunData.load(run).plan.baselines[0]
    assert any(f"KL {with_error(measured.kl, measured.kl_stderr)}, " in label for label in labels)


def test_a_cell_explains_its_unit(page: Browser, run: Path) -> None:
    data = RunData.load(run)
    name = "model.layers.2.mlp.up_proj"
    page.run(
        "const cell = [...document.querySelectorAll('#allocation-chart .cell')]"
        f".find(c => c.getAttribute('aria-label').startsWith('{name},'));"
        "cell.dispatchEvent(new MouseEvent('click', {bubbles: true}));"
    )
    assert page.run("return NAMES[state.unit]") == name
    reasons = page.text("#reasons")
    assert data.plan.assignments[name] in reasons
    units = [unit.name for unit in data.table.units]
    u = units.index(name)
    f = data.table.formats.index(data.plan.assignments[name])
    assert number(data.table.kl[u, f])[:4] in reasons
    assert data.confidence is not None
    assert f"{100 * data.confidence.agreement[u]:.0f} % of 200 bootstrap" in reasons


def test_upgrades_are_those_of_the_hull(page: Browser, run: Path) -> None:
    """What the page says a unit would get next, and from which budget, is the frontier's."""
    data, frontier = RunData.load(run), Frontier.load(run / "frontier.json")
    for u in (0, 5, len(data.table.units) - 1):
        steps = np.flatnonzero(frontier.step_unit == u)
        shown = page.run(f"showUnit({u}); return upgradesOf({u})")
        assert [up["to"] for up in shown] == frontier.step_format[steps].tolist()
        bpw = 8 * frontier.bytes[steps + 1] / frontier.weights
        np.testing.assert_allclose([up["bpw"] for up in shown], bpw)
        at = data.choice[u]
        upgrade = page.run(f"return nextUpgrade({u})")
        sizes, kl = data.table.bytes[u], data.table.kl[u]
        better = [f for f in frontier.step_format[steps] if sizes[f] > sizes[at] and kl[f] < kl[at]]
        assert (upgrade is None) == (not better)
        if upgrade:
            assert upgrade["to"] == better[0]
            slope = (kl[at] - kl[better[0]]) / (sizes[better[0]] - sizes[at])
            assert upgrade["rate"] == pytest.approx(slope, rel=0.01)


def test_units_are_found_by_words(page: Browser) -> None:
    box = page.driver.find_element("css selector", "#unit-filter")
    box.send_keys("layers.3 down")
    assert page.text("#unit-count") == "1 unit"
    assert page.run("return NAMES[state.unit]") == "model.layers.3.mlp.down_proj"
    box.send_keys(" nothing")
    assert "no unit" in page.text("#unit-count")
    assert page.log() == []


def test_sensitivity_follows_its_controls(page: Browser, run: Path) -> None:
    table = RunData.load(run).table
    u = [unit.name for unit in table.units].index("model.layers.1.mlp.gate_proj")
    f = table.formats.index("int3-g64-asym")
    page.run(
        f"const s = document.querySelector('#sensitivity-format'); s.value = '{f}';"
        "s.dispatchEvent(new Event('change'));"
    )
    shown = page.run(f"return sensitivityOf([{u}])")
    assert shown == pytest.approx(table.kl[u, f], rel=1e-3)
    page.run("document.querySelector('#density').click()")
    million = table.units[u].weights / 1e6
    assert page.run(f"return sensitivityOf([{u}])") == pytest.approx(shown / million)
    assert page.log() == []


def test_numbers_are_written_as_everywhere_else(page: Browser) -> None:
    values = [0.18634, 38.52, 30412.0, 0.0, 2.13e-6, 6.72e7, 0.00100, 1e-4, 123456.0]
    assert page.run("return arguments[0].map(number)", values) == [number(v) for v in values]
    pairs = [(0.18634, 0.0041), (0.02131, 0.00123), (0.5, 0.0), (2.13e-6, 4e-8), (0.00213, 8e-5)]
    written = page.run("return arguments[0].map(([a, b]) => withError(a, b))", pairs)
    assert written == [with_error(a, b) for a, b in pairs]


@pytest.mark.parametrize(
    ("name", "units", "options"),
    [
        ("flat", flat_units(), {"budget": "4.6bpw"}),
        ("unmeasured", None, {"measured": False}),
        ("single", None, {"formats": ("int4-g64-asym",), "budget": "4.3125bpw"}),
        ("floats", None, {"formats": ("bf16",), "budget": "16bpw"}),
        ("free", None, {"formats": ("int2-gc", "int4-g64-asym", "bf16"), "budget": "15bpw"}),
    ],
)
def test_unusual_runs_open_without_errors(
    browser: Browser, tmp_path: Path, name: str, units: object, options: dict[str, object]
) -> None:
    write_report(fake_run(tmp_path / name, units, **options))  # type: ignore[arg-type]
    browser.open(tmp_path / name / "report.html")
    press(browser, "#budget", "ARROW_RIGHT")
    press(browser, "#budget", "HOME")
    assert browser.log() == []
    assert faults(browser) == []
    assert "NaN" not in browser.run("return document.body.innerText")


def test_printing_opens_everything_and_hides_controls(page: Browser, tmp_path: Path) -> None:
    page.pdf(tmp_path / "report.pdf")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data[:5] == b"%PDF-"
    assert len(re.findall(rb"/Type\s*/Page\b", data)) >= 4


def test_the_page_of_runs_is_live(browser: Browser, run: Path) -> None:
    server = make_server(run.parent, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/", 390)
        eventually(lambda: "1 run, 0 running" in browser.text("#state"))
        with Job(run.parent / "live", ["bitplan", "search", "x"], {}) as job, job.stage("profile"):
            job.on_progress("Profiling (fisher)", 0, 96)
            eventually(lambda: "2 runs, 1 running" in browser.text("#state"))
            job._written = 0.0  # as if a second had passed
            job.on_progress("Profiling (fisher)", 24, 96)
            eventually(lambda: "24/96" in browser.text(".run .progress"))
            browser.run("document.querySelector('.run .linkish').click()")
            eventually(lambda: "run started" in browser.text(".run .details"))
        eventually(lambda: "2 runs, 0 running" in browser.text("#state"))
        assert browser.run("return document.documentElement.scrollWidth") == 390
        assert browser.log() == []
        assert faults(browser) == []
        link = browser.run("return document.querySelector('a[href$=\"report.html\"]').href")
        browser.open(str(link))
        assert browser.log() == []
        assert "bits per weight" in readout(browser)
    finally:
        server.shutdown()
        server.server_close()

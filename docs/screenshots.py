"""Screenshots of the documentation, from a real run: ``make screenshots`` after ``make demo``."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from bitplan.jobs.listing import list_jobs
from bitplan.jobs.record import JobRecord
from bitplan.reports.compare import compare
from bitplan.reports.compared import write_comparison
from bitplan.reports.html import write_report
from bitplan.reports.serve import make_server
from bitplan.search.solve import solve
from bitplan.tests.browser import Browser, chromium, missing

FOLDER = Path(__file__).resolve().parent / "images"
MOST_BYTES = 300_000
MOST_SECONDS = 600  # for a search to begin its slow stage
PAUSE = 1.0  # seconds until everything is drawn
EXPLAINED = "document.querySelector('#why').scrollIntoView(); scrollBy(0, -16)"


def save(browser: Browser, name: str, width: int, height: int) -> None:
    """Write what the window shows as a PNG of at most 256 colours.

    Raises:
        ValueError: If the file would be larger than MOST_BYTES.
    """
    time.sleep(PAUSE)
    raw = io.BytesIO()
    path = FOLDER / f"{name}.png"
    browser.screenshot(path, whole=False)
    raw.write(path.read_bytes())
    image = Image.open(raw).convert("RGB").crop((0, 0, width, height))
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}. Make it smaller.")
    print(f"{path} {size:,} bytes")


def wait_for_progress(folder: Path) -> None:
    """Wait until a run is in its slow stage and its progress is known.

    Raises:
        TimeoutError: If it takes longer than MOST_SECONDS.
    """
    for _ in range(MOST_SECONDS):
        time.sleep(1)
        if any(job.doing.startswith("Profiling") and job.done for job in list_jobs(folder)):
            return
    raise TimeoutError(f"The run in {folder} did not begin to profile in {MOST_SECONDS} s.")


def photograph_runs(browser: Browser, run: Path, root: Path) -> None:
    """The page of runs: the run, and a search of the same model that is at work."""
    shutil.copytree(run, root / run.name)
    model = JobRecord.load(run).settings["profile"]["model"]
    command = [sys.executable, "-m", "bitplan", "search", model]
    options = ["--budget", "3.5bpw", "--sequences", "24", "--quiet", "--out", root / "smaller"]
    options += ["--rounding", "rtn"]  # which begins to profile at once
    with subprocess.Popen([*command, *map(str, options)]) as search:
        try:
            wait_for_progress(root / "smaller")
            with make_server(Path(os.path.relpath(root)), 0) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                browser.open(f"http://127.0.0.1:{server.server_address[1]}/", 900, 520)
                save(browser, "runs", 900, 520)
                server.shutdown()
        finally:
            search.terminate()


def photograph_comparison(browser: Browser, run: Path, folder: Path) -> None:
    """A comparison of the run with a smaller plan from the same profile."""
    smaller, page = folder / "smaller.json", folder / "compare.html"
    solve(run / "profile.safetensors", "3.8bpw").save(smaller)
    shutil.copy(run / "profile.safetensors", folder)
    found = compare(run, smaller)
    found = replace(found, second=replace(found.second, name=smaller.name))
    write_comparison(found, page)
    browser.open(page, 1200, 1150)
    save(browser, "compare", 1200, 1150)


def main() -> None:
    """Draw the report of a run again and photograph it, the page of runs and a comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, such as runs/demo")
    run: Path = parser.parse_args().run
    if reason := missing():
        raise SystemExit(f"Screenshots: {reason}.")
    FOLDER.mkdir(exist_ok=True)
    write_report(run)
    report, whole = run / "report.html", run.resolve()
    with chromium() as browser, TemporaryDirectory() as temporary:
        browser.open(report, 1200, 1740)
        save(browser, "report", 1200, 1740)
        browser.open(report, 390, 1500)
        save(browser, "report-phone", 390, 1500)
        browser.open(report, 1200, 960, prefers_color_scheme="dark")
        browser.run(EXPLAINED)
        save(browser, "report-why-dark", 1200, 960)
        photograph_comparison(browser, run, Path(temporary))
        root = Path(temporary) / "runs"
        os.chdir(temporary)
        photograph_runs(browser, whole, root)


if __name__ == "__main__":
    main()

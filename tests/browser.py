"""Headless Chromium for tests and screenshots: no network, no traces, one page at a time."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def missing() -> str:
    """What is not installed here, as a reason to skip; empty if nothing is."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs selenium: pip install 'bitplan[dev]'"
    if not (_find("chromium", "chromium-browser", "google-chrome") and _find("chromedriver")):
        return "needs Chromium and its driver: apt-get install chromium chromium-driver"
    return ""


def _find(*names: str) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One window of Chromium.

    Args:
        driver: A selenium driver for it.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str, width: int = 1280, height: int = 900, **media: str) -> None:
        """Open a file or an address in a window of this size.

        Args:
            page: The page.
            width: CSS pixels.
            height: CSS pixels.
            media: Media features, such as ``prefers_color_scheme="dark"``.
        """
        self.driver.get("about:blank")
        self.log()  # what the page before had to say
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in media.items()]
        self.command("Emulation.setEmulatedMedia", features=features)
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def command(self, name: str, **arguments: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; what it returns."""
        return self.driver.execute_script(script, *arguments)

    def log(self) -> list[str]:
        """Messages of the console since the last call, but for notes."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def text(self, selector: str) -> str:
        """The text of the first element that a CSS selector finds; empty if there is none."""
        found = self.run("return document.querySelector(arguments[0])?.textContent", selector)
        return str(found or "")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the page, or of what the window shows of it."""
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        if whole:
            size = self.command("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            shot = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page to a PDF."""
        printed = self.command(
            "Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69
        )
        path.write_bytes(base64.b64decode(printed["data"]))


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh Chromium with a profile of its own, closed afterwards."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with TemporaryDirectory(prefix="chromium-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = _find("chromium", "chromium-browser", "google-chrome") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(_find("chromedriver")))
        try:
            yield Browser(driver)
        finally:
            driver.quit()

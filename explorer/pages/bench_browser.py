"""How long somebody waits in front of a browser: a start of the app, and a switch of page.

Needs Playwright and Chromium, as the browser tests do.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from explorer.errors import ExplorerError

if TYPE_CHECKING:
    from playwright.sync_api import Page

_APP = Path(__file__).resolve().parent.parent.parent / "app.py"
_SECONDS = 120.0
_TITLES = ("Tokens", "Experts", "Load balance", "Attention", "Flow", "Overview")
_FIGURE = ".js-plotly-plot .main-svg"
# the script of the page has ended, and nothing that it drew is still to come
_DRAWN = """title => {
    const app = document.querySelector('[data-testid=stApp]');
    const heading = document.querySelector('[data-testid=stHeading]');
    return app && app.dataset.testScriptState === 'notRunning' && heading
        && heading.innerText.trim() === title
        && !document.querySelector('[data-testid=stSkeleton]');
}"""


def measure(run: Path) -> list[tuple[str, float]]:
    """Return what was waited for, and the seconds: the first figure, then pages one by one.

    The browser is open before the app is started; a page is drawn when its script has ended and no
    placeholder is left.

    Raises
    ------
    ExplorerError
        If there is no Playwright or no Chromium.
    """
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        raise ExplorerError("--browser needs Chromium and `pip install playwright`. Install them.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        started = time.perf_counter()
        with _served(run.parent) as address:
            page.goto(f"{address}/?run={run.stem}")
            page.wait_for_selector(_FIGURE, timeout=_SECONDS * 1e3)
            found = [("start to the first figure", time.perf_counter() - started)]
            page.wait_for_function(_DRAWN, arg="Overview", timeout=_SECONDS * 1e3)
            # what a page imports once is waited for once: the second round is of a warm server
            for turn in ("first", "again"):
                found += [(f"{title}, {turn}", _switch(page, title)) for title in _TITLES]
        browser.close()
    return found


def _switch(page: "Page", title: str) -> float:
    link = page.locator("[data-testid=stSidebarNavLink]").filter(has_text=title).first
    started = time.perf_counter()
    link.click()
    page.wait_for_function(_DRAWN, arg=title, timeout=_SECONDS * 1e3)
    return time.perf_counter() - started


@contextlib.contextmanager
def _served(runs: Path) -> Iterator[str]:
    """Start the app on a free port; yield its address as soon as it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "streamlit", "run", str(_APP)),
        *("--server.port", str(port), "--server.headless", "true"),
        *("--", "--read-only", "--runs", str(runs)),
    ]
    with open(os.devnull, "w") as output:
        process = subprocess.Popen(command, cwd=_APP.parent, stdout=output, stderr=output)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(f"{address}/_stcore/health", process)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait(address: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(address, timeout=2) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise ExplorerError("The app did not start. Start it by hand: streamlit run app.py")

"""How long pages of a run take to make: ``python -m explorer.pages.bench RUN``.

Each page is run as the server runs it (queries, metrics, figures and what is sent to the
browser): of a run that was opened just now, with empty caches; again; with a domain chosen and
empty caches; and with a text that prompts must contain, as if no page had been open before.
Compare runs takes the next run of the folder as B. What the browser takes to draw is not in it;
``--browser`` times a start of the app and switches of page in one. A large run: ``python -m
capture.bench store --rows 10000000 --repeats 1 --folder FOLDER --keep``, and with ``--seed 1`` the
same texts in another model of its shape.
"""

import argparse
import contextlib
import logging
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
from typing import TYPE_CHECKING, NamedTuple

import streamlit as st
from streamlit.testing.v1 import AppTest

from capture.paths import path_argument
from explorer.errors import ExplorerError
from explorer.metrics import load
from explorer.run import open_run
from explorer.ui import state

if TYPE_CHECKING:
    from playwright.sync_api import Page

_APP = Path(__file__).resolve().parent.parent.parent / "app.py"
# pages, with the choice in their address where a page has several topics
PAGES: tuple[tuple[str, dict[str, str]], ...] = (
    *((page, {}) for page in ("overview", "tokens", "experts", "load_balance")),
    ("load_balance", {"topic": "serving"}),
    *((page, {}) for page in ("attention", "flow", "clusters", "compare", "compare_runs")),
    ("compare_runs", {"by": "tokens"}),
    *((page, {}) for page in ("trends", "share", "learn")),
)
_TIMEOUT = 600.0


class Seconds(NamedTuple):
    """Time on the clock, and what all threads computed; that does not grow beside other work."""

    clock: float
    busy: float


class Timed(NamedTuple):
    """One page: made with empty caches, again, and with empty caches for each filter."""

    page: str
    first: Seconds
    again: Seconds
    domain: Seconds | None
    search: Seconds | None


def measure(path: Path, search: str) -> list[Timed]:
    """Time every page of a run, with ``search`` as the text that prompts must contain."""
    with open_run(path) as run:
        domain = next((name for name in run.domains if name), None)
    sys.argv = [str(_APP), "--read-only", "--runs", str(path.parent)]
    # what is imported once is part of a start, not of a page
    app = AppTest.from_file(str(_APP), default_timeout=_TIMEOUT)
    for page, topic in (("overview", {}), *PAGES):
        _show(app, path.stem, page, **topic)
    rows = []
    for page, topic in PAGES:
        app = AppTest.from_file(str(_APP), default_timeout=_TIMEOUT)
        state.close_runs()
        _show(app, path.stem, "overview")
        _forget()
        first = _show(app, path.stem, page, **topic)
        again = _show(app, path.stem, page, **topic)
        filtered: list[Seconds | None] = []
        for name, value in (("domain", domain), ("search", search)):
            _forget()
            chosen = topic | {name: value or ""}
            filtered.append(_show(app, path.stem, page, **chosen) if value else None)
        rows.append(Timed(" ".join([page, *topic.values()]), first, again, *filtered))
    return rows


def _forget() -> None:
    """Empty the caches of answers; the run stays open."""
    st.cache_data.clear()
    load.forget_floors()


def _show(app: AppTest, run: str, page: str, **filters: str) -> Seconds:
    app.query_params.clear()
    app.query_params.update({"run": run, **filters})
    # pages are known to Streamlit after a first run only, which shows the overview
    if page != "overview":
        app.switch_page(f"explorer/pages/{page}/page.py")
    clock, busy = time.perf_counter(), time.process_time()
    app.run()
    seconds = Seconds(time.perf_counter() - clock, time.process_time() - busy)
    if app.exception:
        raise RuntimeError(f"the page {page} failed: {app.exception[0].message}")
    return seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m explorer.pages.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=path_argument, help="a run file")
    parser.add_argument("--browser", action="store_true", help="time what a browser shows instead")
    parser.add_argument("--search", default="", metavar="TEXT", help="that prompts must contain")
    options = parser.parse_args()
    path: Path = options.run.resolve()
    with open_run(path) as run:
        rows = int(run.info["n_tokens"]) * len(run.sites)
    sys.stdout.write(f"{path.name}: {rows:,} (token, layer) rows; seconds (CPU seconds)\n")
    if options.browser:
        for what, seconds in measure_browser(path):
            sys.stdout.write(f"{what:28}{seconds:8.2f}\n")
        return
    logging.disable(logging.WARNING)  # Streamlit says many times that no server runs
    sys.stdout.write(f"{'page':22}{'first':>14}{'again':>14}{'domain':>14}{'search':>14}\n")
    for timed in measure(path, options.search):
        cells = map(_cell, timed[1:])
        sys.stdout.write(f"{timed.page:22}{''.join(cells)}\n")


def _cell(seconds: Seconds | None) -> str:
    text = "-" if seconds is None else f"{seconds.clock:.2f} ({seconds.busy:.2f})"
    return f"{text:>14}"


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


def measure_browser(run: Path) -> list[tuple[str, float]]:
    """Return what somebody waits for in a browser, and how many seconds: a start, then pages.

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


if __name__ == "__main__":
    main()

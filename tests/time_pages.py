"""How long pages of a run take to make: ``python tests/time_pages.py RUN``.

Each page is run as the server runs it (queries, metrics, figures and what is sent to the
browser): of a run that was opened just now, with empty caches; again; with a domain chosen and
empty caches; and with a text that prompts must contain, as if no page had been open before.
Compare runs takes the next run of the folder as B. What the browser takes to draw is not in it;
``--browser`` times a start of the app and switches of page in one. A large run: ``python -m
capture.bench store --rows 10000000 --repeats 1 --folder FOLDER --keep``, and with ``--seed 1`` the
same texts in another model of its shape.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import streamlit as st
from browser import ROOT, browser, serve, settle
from streamlit.testing.v1 import AppTest

from capture.paths import path_argument
from explorer.metrics import load
from explorer.run import open_run
from explorer.ui import state

_APP = ROOT / "app.py"
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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


_TITLES = ("Tokens", "Experts", "Load balance", "Attention", "Flow", "Overview")


def measure_browser(run: Path) -> list[tuple[str, float]]:
    """Return what somebody waits for in a browser, and how many seconds: a start, then pages.

    The browser is open before the app is started; a page is drawn when nothing changes any more.
    """
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1400, "height": 900})
        started = time.perf_counter()
        with serve(run.parent, options=("--read-only",)) as address:
            page.goto(f"{address}/?run={run.stem}")
            page.wait_for_selector(".js-plotly-plot .main-svg", timeout=120_000)
            found = [("start to the first figure", time.perf_counter() - started)]
            settle(page)
            # what a page imports once is waited for once: the second round is of a warm server
            for turn in ("first", "again"):
                found += [(f"{title}, {turn}", _switch(page, title)) for title in _TITLES]
    return found


def _switch(page, title: str) -> float:
    link = page.locator("[data-testid=stSidebarNavLink]").filter(has_text=title).first
    started = time.perf_counter()
    link.click()
    page.locator("[data-testid=stHeading]").filter(has_text=title).first.wait_for()
    settle(page)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

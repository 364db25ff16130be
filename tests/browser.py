"""A served app and a headless Chromium, for tests and pictures."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

SIZE = {"width": 1400, "height": 900}
# where a cell of the first figure is on the screen
CELL = """([x, y, which]) => {
    const plot = document.querySelectorAll('.js-plotly-plot')[which];
    plot.scrollIntoView({block: 'center'});
    const box = plot.getBoundingClientRect(), layout = plot._fullLayout;
    return [box.left + layout.xaxis._offset + layout.xaxis.d2p(x),
            box.top + layout.yaxis._offset + layout.yaxis.d2p(y)];
}"""


def chromium_path():
    """Return the installed Chromium, or None."""
    # the headless shell is Chromium without the pages of its own window, which cost time too
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


@contextlib.contextmanager
def serve(runs, log=None, options=(), flags=()):
    """Start the app, with options of its own and flags of Streamlit, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "streamlit", "run", str(ROOT / "app.py")),
        *("--server.port", str(port), "--server.headless", "true"),
        *flags,
        *("--", "--runs", str(runs), *options),
    ]
    with open(log or os.devnull, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(address, process, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"streamlit ended with status {process.returncode}")
        with (
            contextlib.suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=2) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the app did not answer within {seconds} s")


@contextlib.contextmanager
def browser():
    """Yield a headless Chromium, driven over its debugging pipe."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


def settle(page, timeout=60_000):
    """Wait until the page's script has ended and its figures are drawn."""
    page.wait_for_selector(
        "[data-testid=stApp][data-test-script-state=notRunning]", timeout=timeout
    )
    page.wait_for_selector("[data-testid=stHeading]", timeout=timeout)
    page.wait_for_function(
        "() => !document.querySelector('[data-testid=stSkeleton]')", timeout=timeout
    )
    page.wait_for_timeout(600)
    page.wait_for_selector(
        "[data-testid=stApp][data-test-script-state=notRunning]", timeout=timeout
    )


def visit(page, url):
    page.goto(url)
    settle(page)


def click_cell(page, x, y, which=0):
    page.wait_for_selector(".js-plotly-plot .plot-container")
    page.wait_for_timeout(500)
    left, top = page.evaluate(CELL, [x, y, which])
    page.mouse.move(left - 3, top)
    page.mouse.move(left, top)
    page.wait_for_timeout(200)
    page.mouse.click(left, top)


def token(page, text):
    return page.locator(".strip .token", has_text=re.compile(f"^{re.escape(text)}$")).first

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
from urllib.parse import urljoin

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # the pages of the app share one process, and what it compiled (see `visit`)
    "--process-per-site",
]

SIZE = {"width": 1400, "height": 900}
# milliseconds without a change until a page counts as drawn
QUIET = 150
# whether the script has ended, its figures are drawn, and nothing has changed for a while
SETTLED = """(quiet) => {
    const now = performance.now();
    if (window.changed === undefined) {
        const note = () => { window.changed = performance.now(); };
        const all = {subtree: true, childList: true, attributes: true, characterData: true};
        new MutationObserver(note).observe(document, all);
        note();
    }
    const app = document.querySelector('[data-testid=stApp]');
    const drawn = app?.dataset.testScriptState === 'notRunning'
        && document.querySelector('[data-testid=stHeading]')
        && !document.querySelector('[data-testid=stSkeleton]')
        && [...document.querySelectorAll('[data-testid=stPlotlyChart]')]
            .every((chart) => chart.querySelector('.js-plotly-plot .main-svg'));
    if (!drawn) window.changed = now;
    return now - window.changed >= quiet;
}"""
# where a place of a figure is on the screen, once it has been there for a frame
PLACE = """([which, place, x, y]) => {
    const plot = document.querySelectorAll('.js-plotly-plot')[which];
    if (!plot?._fullLayout?.xaxis) return null;
    plot.scrollIntoView({block: 'center'});
    const box = plot.getBoundingClientRect(), {xaxis, yaxis} = plot._fullLayout;
    const [a, b] = place === 'data' ? [xaxis.d2p(x), yaxis.d2p(y)]
        : [x * xaxis._length, y * yaxis._length];
    const found = [box.left + xaxis._offset + a, box.top + yaxis._offset + b,
                   xaxis.p2d(a), yaxis.p2d(b)];
    const rests = String(window.placed) === String(found);
    window.placed = rests ? null : found;
    return rests && found;
}"""
# whether a figure knows what is under the mouse
OVER = "(which) => document.querySelectorAll('.js-plotly-plot')[which]._hoverdata?.length"

# each text with a contrast below WCAG's 4.5 (1.4.3): [contrast, element, text]
FAINT = """() => {
    const found = [];
    const rgba = (text) => {
        const parts = (text.match(/[\\d.]+/g) ?? []).map(Number);
        const unit = text.startsWith('color(srgb') ? 255 : 1;
        return parts.length < 3 ? [0, 0, 0, 0]
            : [...parts.slice(0, 3).map((part) => part * unit), parts[3] ?? 1];
    };
    const over = (upper, lower) =>
        [0, 1, 2].map((i) => upper[i] * upper[3] + lower[i] * (1 - upper[3])).concat(1);
    const linear = (c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) =>
        0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
    const above = (node) => node.parentElement ?? node.getRootNode().host;
    const chain = (node) => { const all = []; for (; node; node = above(node)) all.push(node);
                              return all; };
    const ground = (node) => chain(node).map((one) => rgba(getComputedStyle(one).backgroundColor))
        .reverse().reduce((lower, upper) => over(upper, lower), [255, 255, 255, 1]);
    const look = (root) => {
        for (const node of root.querySelectorAll('*')) {
            if (node.shadowRoot) look(node.shadowRoot);
            const words = [...node.childNodes].filter((child) => child.nodeType === 3)
                .map((child) => child.textContent.trim()).join(' ').trim();
            // WCAG exempts what is disabled; icons are no text; a slider's number is beside its
            // thumb, and text on a bar or a node is on another ground than the figure's
            const exempt = ':disabled, script, style, [data-testid=stIconMaterial], .bars, .sankey,'
                + '[data-testid=stSlider]';
            if (!words || node.closest(exempt) || !node.getClientRects().length) continue;
            const style = getComputedStyle(node);
            const faded = chain(node)
                .reduce((part, one) => part * getComputedStyle(one).opacity, 1);
            const plot = node.ownerSVGElement && node.closest('.js-plotly-plot');
            if (style.visibility === 'hidden' || faded < 0.05) continue;
            const color = rgba(plot ? style.fill : style.color);
            color[3] *= faded;
            const lower = plot ? rgba(plot._fullLayout.paper_bgcolor.replace(/#(..)(..)(..)/,
                (_, ...hex) => hex.slice(0, 3).map((part) => parseInt(part, 16)).join(' ')))
                : ground(node);
            const [dim, bright] = [luminance(over(color, lower)), luminance(lower)]
                .sort((a, b) => a - b);
            if (bright / dim < 4.5) {
                found.push([(bright / dim).toFixed(2), node.tagName, words.slice(0, 40)]);
            }
        }
    };
    look(document);
    return found;
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
        time.sleep(0.05)
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
    """Wait until the page's script has ended, its figures are drawn and nothing changes any more.

    A click, a key or a choice takes effect on the state of the script before this looks at it.
    """
    # asked at every frame, as is the default, the page is painted at every frame too
    page.wait_for_function(SETTLED, arg=QUIET, timeout=timeout, polling=50)


def visit(page, url):
    """Open a link as somebody who has not been there.

    The first visit leaves a page without any script open, so that the process of the app's pages
    stays when they are closed: it has compiled what the next one needs.
    """
    if len(page.context.pages) == 1:
        page.context.new_page().goto(urljoin(url, "/_stcore/health"))
    page.goto(url)
    settle(page)


def place(page, x, y, which=0, of="data"):
    """Return where a place of a figure is: across, down, and in its data.

    It is given in the figure's data, or as a part of the plot's width and height (`of="plot"`).
    """
    settle(page)
    return page.wait_for_function(PLACE, arg=[which, of, x, y]).json_value()


def point_at(page, x, y, which=0):
    """Move the mouse to a cell of a figure, which then knows about it; return where that is."""
    left, top, *_ = place(page, x, y, which)
    page.mouse.move(left - 3, top)
    page.mouse.move(left, top)
    page.wait_for_function(OVER, arg=which)
    return left, top


def click_cell(page, x, y, which=0):
    page.mouse.click(*point_at(page, x, y, which))


def token(page, text):
    return page.locator(".strip .token", has_text=re.compile(f"^{re.escape(text)}$")).first


def faint(page):
    """Return each text that is not read on its ground, see `FAINT`, which must find a heading."""
    found = page.evaluate(FAINT)
    heading = page.locator("h1")
    heading.evaluate("heading => { heading.style.opacity = 0.4; }")
    assert heading.inner_text() in [words for *_, words in page.evaluate(FAINT)]
    heading.evaluate("heading => { heading.style.opacity = 1; }")
    return found


def has_run_nothing(page):
    """Check that no text of a stranger became a part of the page, and that nothing failed."""
    assert not page.locator("img[src=x]").count()
    assert not page.locator(".strip b, .strip script, .hoverlayer script").count()
    assert not page.locator("[data-testid=stException]").count()
    assert not page.troubles

"""How long pages of a run take to make: ``python -m explorer.pages.bench RUN``.

Each page is run as the server runs it (queries, metrics, figures and what is sent to the
browser), in one process with empty caches: opened first, opened again, and with a domain chosen.
What the browser takes to draw is not in it. A large run: ``python -m capture.bench store --rows
10000000 --repeats 1 --folder FOLDER --keep``.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from explorer.run import open_run

if TYPE_CHECKING:
    from streamlit.testing.v1 import AppTest

_APP = Path(__file__).resolve().parent.parent.parent / "app.py"
PAGES = (
    *("overview", "tokens", "experts", "load_balance", "attention", "flow", "clusters", "compare"),
)
_TIMEOUT = 600.0


class Timed(NamedTuple):
    """Seconds of one page: its first run, a later one, and one with a domain chosen."""

    page: str
    first: float
    again: float
    filtered: float | None


def measure(path: Path) -> list[Timed]:
    """Time every page of a run."""
    from streamlit.testing.v1 import AppTest

    with open_run(path) as run:
        domain = next((name for name in run.domains if name), None)
    sys.argv = [str(_APP), "--read-only", "--runs", str(path.parent)]
    app = AppTest.from_file(str(_APP), default_timeout=_TIMEOUT)
    rows = []
    for page in PAGES:
        first = _run(app, path.stem, page, "")
        again = _run(app, path.stem, page, "")
        filtered = _run(app, path.stem, page, domain) if domain else None
        rows.append(Timed(page, first, again, filtered))
    return rows


def _run(app: "AppTest", run: str, page: str, domain: str) -> float:
    app.query_params["run"] = run
    if domain:
        app.query_params["domain"] = domain
    elif "domain" in app.query_params:
        del app.query_params["domain"]
    started = time.perf_counter()
    # pages are known to Streamlit after a first run only, which shows the overview
    if page != "overview":
        app.switch_page(f"explorer/pages/{page}.py")
    app.run()
    seconds = time.perf_counter() - started
    if app.exception:
        raise RuntimeError(f"the page {page} failed: {app.exception[0].message}")
    return seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m explorer.pages.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="a run file")
    path = parser.parse_args().run.resolve()
    with open_run(path) as run:
        rows = int(run.info["n_tokens"]) * len(run.sites)
    sys.stdout.write(f"{path.name}: {rows:,} (token, layer) rows; seconds on the server\n")
    sys.stdout.write(f"{'page':14}{'first':>8}{'again':>8}{'domain':>8}\n")
    for timed in measure(path):
        chosen = "-" if timed.filtered is None else f"{timed.filtered:.2f}"
        sys.stdout.write(f"{timed.page:14}{timed.first:8.2f}{timed.again:8.2f}{chosen:>8}\n")


if __name__ == "__main__":
    main()

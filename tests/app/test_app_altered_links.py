"""Links that somebody altered, on every page of one session: no page breaks, and nothing leaks."""

import os
import random
import string
import threading

import pytest
from app_pages import opened, query
from synthetic import write_run

pytestmark = pytest.mark.slow

PAGES = (
    "overview", "tokens", "experts", "load_balance", "attention", "flow", "clusters", "compare",
    "compare_runs", "trends", "share", "capture", "learn",
)  # fmt: skip
# what addresses of the app hold, each right on some page
RIGHT = {
    "run": "known", "layer": "1.0", "expert": "1", "domain": "a", "phase": "prompt", "prompt": "0",
    "token": "1", "head": "1.0", "search": "the", "layers": "1-1", "measure": "share", "seed": "0",
    "slice": "mine", "comparison": "known.x.comparison", "view": "0123456789", "runs": "known",
    "color": "entropy", "pair": "flow.1.0.1.0", "gpus": "2", "order": "id", "job": "1",
}  # fmt: skip
STRANGE = (
    "", " ", "-1", "0x10", "1e309", "nan", "inf", "٣", "9" * 40, "../known", "%00", "\u202e", "<b>",
    "'; DROP TABLE run; --", "null", "[1]", "1.0.0.0", "a,b", "𝕏" * 300, "1-0", "$x$", ":red[x]",
)  # fmt: skip


def altered(choose):
    """Return an address of which some values were altered, as somebody does who plays with it."""
    names = choose.sample([name for name in RIGHT if name != "run"], 9)
    chosen = {"run": "known"} | {name: RIGHT[name] for name in names}
    for name in choose.sample(names, 5):
        cut = choose.randrange(len(chosen[name]) + 1)
        chosen[name] = choose.choice(
            [
                choose.choice(STRANGE),
                chosen[name][:cut] + choose.choice(string.printable) + chosen[name][cut:],
                chosen[choose.choice(names)],
            ]
        )
    return chosen


def held():
    """Return how many files and threads this process holds, without timers that are over."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer) and thread.finished.is_set():
            thread.join()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.slow(seconds=5)
def test_altered_links_break_no_page_and_leak_nothing(runs):
    write_run(runs / "known.duckdb", level="attention")
    choose = random.Random(7)
    app = opened(run="known")

    def visit_all():
        for page in PAGES:
            address = altered(choose)
            app.query_params.clear()
            for name, value in address.items():
                app.query_params[name] = value
            app.switch_page(f"explorer/pages/{page}/page.py").run()
            assert not app.exception, (page, address, app.exception[0].stack_trace)
            assert query(app, "run") == "known"

    visit_all()
    before = held()
    visit_all()
    assert held() == before

"""The benchmark of pages runs, and times what it says."""

import sys

import pytest
import time_pages as bench
from synthetic import write_run

pytestmark = pytest.mark.slow


def test_every_page_is_timed_with_and_without_filters(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run.duckdb").path
    monkeypatch.setattr(bench, "PAGES", (("overview", {}), ("flow", {"steps": "2"})))
    monkeypatch.setattr(sys, "argv", ["bench"])
    shown = []
    show = bench._show

    def watched(app, run, page, **filters):
        seconds = show(app, run, page, **filters)
        # what the page did with the address is part of it
        kept = {name: "".join(app.query_params.get(name, "")) for name in ("domain", "search")}
        shown.append((app.title[0].value, kept["domain"], kept["search"]))
        return seconds

    monkeypatch.setattr(bench, "_show", watched)
    rows = bench.measure(path, "court")
    assert [row.page for row in rows] == ["overview", "flow 2"]
    assert all(s.clock > 0 and s.busy > 0 for row in rows for s in row[1:])
    assert shown[-4:] == [
        ("Flow", "", ""), ("Flow", "", ""), ("Flow", "code", ""), ("Flow", "", "court")
    ]  # fmt: skip

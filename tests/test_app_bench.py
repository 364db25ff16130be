"""The benchmark of pages runs, and times what it says."""

import sys

from synthetic import write_run

from explorer.pages import bench


def test_every_page_is_timed_with_and_without_a_domain(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run.duckdb").path
    monkeypatch.setattr(bench, "PAGES", ("overview", "flow"))
    monkeypatch.setattr(sys, "argv", ["bench"])
    shown = []
    show = bench._show

    def watched(app, run, page, domain):
        seconds = show(app, run, page, domain)
        shown.append((page, "".join(app.query_params.get("domain", "")), app.title[0].value))
        return seconds

    monkeypatch.setattr(bench, "_show", watched)
    rows = bench.measure(path)
    assert [row.page for row in rows] == ["overview", "flow"]
    assert all(s.clock > 0 and s.busy > 0 for row in rows for s in row[1:])
    # each page is opened twice and then filtered; the title says that it is the page
    assert shown[-3:] == [("flow", "", "Flow"), ("flow", "", "Flow"), ("flow", "code", "Flow")]

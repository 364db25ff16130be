"""Pages of a run that another program recorded: what the trace lacks is said, never drawn as 0."""

import json
import sys
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
from app_pages import charts, opened

from capture.traces import import_routing
from explorer.__main__ import main
from explorer.run import open_run
from explorer.ui.wording import unnamed

PAGES = (
    *("overview", "tokens", "experts", "load_balance", "attention", "flow", "clusters"),
    *("compare", "compare_runs", "trends", "share", "learn", "capture"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of ids alone: no weights, scores, texts or vocabulary ids, and one gap."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    ids = [np.argsort(random.random((n, 3, 8)), -1)[..., :2].astype(np.int32) for n in (9, 14)]
    ids[0][4, 1] = 0
    import_routing(ids, folder / "traced.duckdb")
    steps = np.random.default_rng(1).integers(1, 90, (12, 3, 8))
    rows = [
        f"{step},{layer},{expert},{count}" for (step, layer, expert), count in np.ndenumerate(steps)
    ]
    table = folder / "counts.csv"
    table.write_text("\n".join(["step,layer,expert,count", *rows]))
    import_routing(table, folder / "counted.duckdb", top_k=2)
    return folder


@pytest.fixture(autouse=True)
def served(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(runs)])


def test_the_overview_says_where_it_is_from_and_what_it_lacks():
    app = opened("overview", run="traced")
    about = next(table.value for table in app.dataframe if "what" in table.value)
    said = about.set_index("what")["value"]
    assert said["Imported"] == (
        "from arrays: no scores, text or loss, no weights, so that slots are in no order, "
        "1 (token, layer) not recorded"
    )


def test_counts_say_what_they_are_and_lack():
    app = opened("overview", run="counted")
    about = next(table.value for table in app.dataframe if "what" in table.value)
    said = about.set_index("what")["value"]
    assert said["Imported"].startswith("from table of counts: sums only: no tokens, weights")
    assert said["Recorded"].endswith("as counts, in 12 steps of time")
    tokens = next(tile for tile in app.metric if tile.label == "Tokens")
    assert tokens.delta == "assignments over top k"
    assert any("imported from counts" in box.value for box in app.info)
    expert = opened("experts", run="counted")
    assert next(t.value for t in expert.metric if t.label == "Mean combine weight") == "–"
    assert any("does not name its model" in box.value for box in expert.info)


def test_counts_show_load_over_their_steps(runs):
    figures = [json.loads(c.spec) for c in charts(opened("load_balance", run="counted"))]
    over_steps = next(f for f in figures if "Load by step" in str(f["layout"]["title"]))
    assert len(b64decode(over_steps["data"][0]["y"]["bdata"])) == 12
    lines = json.loads(charts(opened("trends", run="counted"))[0].spec)
    with open_run(runs / "counted.duckdb") as run:
        for number, line in enumerate(lines["data"]):
            load = run.query(
                "SELECT step, max(assignments) / avg(assignments) - 1 AS worst FROM load_windows"
                " WHERE layer = $layer GROUP BY step ORDER BY step",
                {"layer": number},
            )
            assert np.frombuffer(b64decode(line["y"]["bdata"])).tolist() == pytest.approx(
                load["worst"].tolist()
            )


def test_placements_are_judged_on_windows_of_steps(runs, capsys):
    assert main(["place", str(runs / "counted.duckdb"), "--gpus", "2", "--windows", "4"]) == 0
    assert (
        "4 windows of consecutive forward passes, at level counts steps, 3 layers"
        in capsys.readouterr().out
    )


def test_experts_without_weights_are_equal_bars():
    app = opened("tokens", run="traced")
    route = json.loads(next(c.spec for c in charts(app) if "Experts by layer" in c.spec))
    assert "weights were not recorded" in str(route["layout"])
    assert "combine weight not recorded" in route["data"][0]["hovertemplate"]
    lengths = [b64decode(bar["x"]["bdata"]) for bar in route["data"]]
    assert [np.frombuffer(one).tolist() for one in lengths] == [[0.5] * 3] * 2
    assert any("sent this token to expert" in one.value for one in app.markdown)


def test_a_token_without_text_is_called_by_its_id_or_its_position():
    assert unnamed(7, 3) == "⟨7⟩"
    assert unnamed(pd.NA, 3) == unnamed(None, 3) == "⟨#3⟩"


@pytest.mark.parametrize("run", ["traced", "counted"])
@pytest.mark.parametrize("page", PAGES)
def test_no_page_fails_on_a_trace(page, run):
    app = opened(page, run=run)
    assert not app.error
    assert not any("nan" in str(tile.value).lower() for tile in app.metric)

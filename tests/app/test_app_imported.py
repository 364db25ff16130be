"""Pages of a run that another program recorded: what the trace lacks is said, never drawn as 0."""

import json
import sys
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
from app_pages import charts, opened

from capture.traces import import_routing
from explorer.ui.wording import unnamed

PAGES = ("overview", "tokens", "experts", "load_balance", "attention", "flow", "clusters")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of ids alone: no weights, scores, texts or vocabulary ids, and one gap."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    ids = [np.argsort(random.random((n, 3, 8)), -1)[..., :2].astype(np.int32) for n in (9, 14)]
    ids[0][4, 1] = 0
    import_routing(ids, folder / "traced.duckdb")
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


@pytest.mark.parametrize("page", PAGES)
def test_no_page_fails_on_a_trace(page):
    app = opened(page, run="traced")
    assert not app.error
    assert not any("nan" in str(tile.value).lower() for tile in app.metric)

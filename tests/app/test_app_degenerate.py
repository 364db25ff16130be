"""Pages of runs with too little in them: one expert, one token. No number is ``nan``."""

import json
import re
import sys

import pytest
import streamlit as st
from synthetic import write_run
from test_app_pages import opened

from capture.store import SiteInfo
from explorer.errors import RunError
from explorer.ui.wording import number, span

pytestmark = pytest.mark.slow

_UNDEFINED = re.compile(r"(?<![\w.])(nan|NaN|inf|None|NaT)(?![\w(])")
ONE = (SiteInfo(0, 0, "model.layers.0.mlp", 1, 1, 0, "softmax"),)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    yield tmp_path
    st.cache_resource.clear()


def texts(app):
    """Yield every text that a page shows: tiles, sentences, figures and what they say."""
    for kind in ("markdown", "caption", "info", "warning", "error"):
        yield from (element.value for element in app.get(kind))
    for tile in app.metric:
        yield from (tile.value, tile.delta)
    for chart in app.get("plotly_chart"):
        yield chart.proto.alt
        figure = json.loads(chart.proto.spec)
        yield from _strings({k: v for k, v in figure["layout"].items() if k != "template"})
        yield from _strings(figure["data"])


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        # numbers that travel as text
        yield from (text for k, v in value.items() if k != "bdata" for text in _strings(v))
    elif isinstance(value, list):
        yield from (text for one in value for text in _strings(one))


@pytest.mark.parametrize(
    ("page", "query"),
    [
        ("overview", {}),
        ("load_balance", {}),
        ("load_balance", {"metric": "normalized_entropy"}),
        ("attention", {}),
        ("clusters", {"map": "prompts"}),
    ],
)
def test_a_router_of_one_expert_has_no_nan(folder, page, query):
    write_run(folder / "one.duckdb", sites=ONE, level="attention")
    app = opened(page, **query)
    shown = [text for text in texts(app) if text]
    assert shown and not [text for text in shown if _UNDEFINED.search(text)]
    tiles = {tile.label: (tile.value, tile.delta) for tile in app.metric}
    if page in ("overview", "load_balance"):
        assert tiles["Load entropy"] == ("–", "not defined for one expert")
    if page == "overview":
        assert tiles["Gate entropy"] == ("–", "not defined for one expert")
    if query.get("metric"):
        assert "Load entropy: not defined for one expert." in [info.value for info in app.info]
    if page == "clusters":
        (said,) = (info.value for info in app.info if "vectors are equal" in info.value)
        assert "the map is one point and the prompts are one cluster" in said


@pytest.mark.parametrize(
    ("value", "shown"),
    [(float("nan"), "–"), (float("inf"), "–"), (None, "–"), (0.0, "0.00"), (-1.5, "-1.50")],
)
def test_what_is_not_defined_is_a_dash(value, shown):
    assert number(value, ".2f") == shown


def test_a_span_leaves_out_what_is_not_defined():
    assert span([float("nan"), 1, 3], ".1f") == "from 1.0 to 3.0"
    assert span([float("nan")]) == span([]) == "not defined for any"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("secret"), "Lorenz curve: this part could not be drawn (ValueError)."),
        (RunError("Record it again."), "Lorenz curve: Record it again."),
    ],
)
def test_a_part_that_fails_takes_no_other_one_down(folder, monkeypatch, error, said):
    write_run(folder / "known.duckdb")

    def broken(*_, **__):
        raise error

    monkeypatch.setattr("explorer.pages.load_balance.figures.lorenz", broken)
    app = opened("load_balance")
    assert [message.value.replace("\\", "") for message in app.error] == [said]
    shown = {json.loads(c.proto.spec)["layout"]["title"]["text"] for c in app.get("plotly_chart")}
    for title in ("Load of the experts of layer 1", "Load by domain", "What a capacity limit"):
        assert any(title in text for text in shown), (title, shown)

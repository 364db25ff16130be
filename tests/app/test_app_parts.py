"""One figure that fails says so, and what stands beside it on its page stays."""

import json
import shutil

import pytest
from app_pages import charts, opened
from synthetic import write_run
from test_app_compare import write_results

pytestmark = pytest.mark.slow

KEPT = {  # a figure's or a heading's words that are there all the same
    "learn": ("Glossary",),
    "tokens": ("Experts by layer",),
    "compare": ("A router's card", "The same text under two routers", "Domain by domain"),
    "trends": (),
    "compare_runs": ("A: load",),
}


@pytest.fixture
def folder(runs):
    write_run(runs / "known.duckdb")
    write_results(runs)
    for step in (1, 2):
        shutil.copy(runs / "known.duckdb", runs / f"step_{step}.duckdb")
    return runs


def words(app):
    yield from (heading.value for heading in app.subheader)
    yield from (json.loads(chart.spec)["layout"]["title"]["text"] for chart in charts(app))


@pytest.mark.parametrize(
    ("page", "query", "broken", "part"),
    [
        ("learn", {}, "explorer.ui.wording.routing_sentence", "What is a router?"),
        (
            "learn",
            {"step": "load"},
            "explorer.pages.load_balance.figures.load_bars",
            "Who gets the work?",
        ),
        (
            "learn",
            {"step": "path"},
            "explorer.pages.tokens.figures.token_routes",
            "From layer to layer",
        ),
        ("tokens", {}, "explorer.pages.tokens.figures.token_layer_heatmap", "Tokens by layer"),
        (
            "tokens",
            {"expert": "1"},
            "explorer.ui.concordance.expert_vocabulary",
            "Tokens of the expert",
        ),
        ("compare", {}, "explorer.pages.compare.figures.front", "Loss against compute"),
        ("compare", {}, "explorer.pages.compare.figures.oracle_bound", "Oracle"),
        ("trends", {"source": "folder"}, "explorer.pages.trends.figures.trend_lines", "Figure"),
        (
            "compare_runs",
            {"against": "step_1"},
            "explorer.pages.compare_runs.data.differences",
            "What differs between the recordings",
        ),
    ],
)
def test_a_part_that_fails_leaves_the_others(folder, monkeypatch, page, query, broken, part):
    def fails(*_, **__):
        raise KeyError("secret")

    monkeypatch.setattr(broken, fails)
    app = opened(page, run="known", **query)
    said = f"{part}: this part could not be drawn (KeyError)."
    assert [message.value.replace("\\", "") for message in app.error] == [said]
    shown = list(words(app))
    assert (
        app.markdown
        and [kept for kept in KEPT[page] if not any(kept in text for text in shown)] == []
    )

"""Trends: how many tokens each run has, and runs that share no prompt."""

import json
import re
import sys

import pytest
import streamlit as st
import synthetic
from synthetic import write_run
from test_app_pages import charts, notes, opened

from explorer import open_run
from explorer.pages.trends.data import expert_loads, in_order, trend_table
from explorer.queries.overview import token_count

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder of three runs: the second has fewer prompts, the first others."""
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    every = synthetic.PROMPTS
    others = [(domain, [f"other {piece}" for piece in pieces]) for domain, pieces in every]
    cut = [(domain, pieces if n != 5 else ["else"]) for n, (domain, pieces) in enumerate(every)]
    for seed, (step, prompts) in enumerate(((10, others), (20, cut), (30, every))):
        monkeypatch.setattr(synthetic, "PROMPTS", prompts)
        write_run(tmp_path / f"step_{step}.duckdb", seed=seed)
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def shown(app):
    figure, experts = (json.loads(chart.spec) for chart in charts(app))
    assert len(experts["data"][0]["z"]) == 3 and "checkpoint" in experts["layout"]["title"]["text"]
    caption = figure["layout"]["title"]["subtitle"]["text"].replace("<br>", "; ")
    return figure["data"][0]["customdata"], caption


def test_each_checkpoint_has_its_own_n(folder):
    with (
        open_run(folder / "step_10.duckdb") as a,
        open_run(folder / "step_20.duckdb") as b,
        open_run(folder / "step_30.duckdb") as c,
    ):
        checkpoints = in_order([("step_10", a), ("step_20", b), ("step_30", c)])
        table = trend_table(checkpoints)
        tokens = [token_count(run) for run in (a, b, c)]
        site = a.sites[0]
        only = {"domain": "code", "phase": "prompt"}
        load = expert_loads(checkpoints, site.layer, site=site.site, **only)
        of_code = load.groupby("checkpoint")["assignments"].sum().tolist()
        chosen = (
            "SELECT count(*) AS n FROM assignments JOIN tokens USING (token_id) JOIN prompts"
            " USING (prompt_id) WHERE domain = 'code' AND phase = 'prompt'"
            f" AND layer = {site.layer} AND site = {site.site}"
        )
        assert of_code == [run.query(chosen)["n"].iloc[0] for run in (a, b, c)]
    counts = table.drop_duplicates("name")
    assert counts["tokens"].tolist() == tokens and len(set(tokens)) == 2
    # the last one shares all of its prompt tokens with itself
    none, same, every = counts["shared"].tolist()
    assert none == 0 < same < every == sum(len(pieces) for _, pieces in synthetic.PROMPTS)
    hovers, caption = shown(opened("trends", source="folder", trend="max_violation"))
    said = ", ".join(f"{n} (step_{step})" for step, n in zip((10, 20, 30), tokens, strict=True))
    assert f"n = {said} tokens" in caption
    assert hovers == [f"n = {n}" for n in tokens]
    hovers, caption = shown(opened("trends", source="folder"))
    said = f"n = 0 (step_10), {same} (step_20), {every} (step_30)"
    assert f"{said} tokens, shared with the last one" in caption
    assert hovers == ["n = 0", f"n = {same}", f"n = {every}"]


def test_runs_without_shared_prompts_say_so(folder):
    app = opened("trends", source="folder")
    assert "No prompt in common with step_30: step_10." in notes(app)
    assert "step_20." not in notes(app)
    (folder / "step_20.duckdb").unlink()
    app = opened("trends", source="folder")
    # the last one is like itself, which is no news
    assert len(charts(app)) == 1 and "There is nothing to draw" in notes(app)


def test_a_run_that_comes_is_drawn_without_a_restart(folder):
    app = opened("trends", source="live", trend="max_violation")
    write_run(folder / "step_9.duckdb", seed=3)
    write_run(folder / "step_40.duckdb", seed=4)
    app.run()  # as the part that looks at the folder asks for
    assert "5 runs with `step` in the name" in " ".join(one.value for one in app.caption)
    drawn = json.loads(charts(app)[0].spec)["layout"]["xaxis"]["ticktext"]
    assert [int(re.search(r"\d+", one)[0]) for one in drawn] == [9, 10, 20, 30, 40]
    assert "runs" not in app.query_params


def test_a_run_without_a_token_of_the_selection_is_named(folder, monkeypatch):
    prompts = [("rare", ["only", " here"]), *synthetic.PROMPTS[1:]]
    monkeypatch.setattr(synthetic, "PROMPTS", prompts)
    write_run(folder / "step_40.duckdb", seed=4)
    app = opened("trends", source="folder", run="step_40", domain="rare", trend="max_violation")
    assert "No token of this selection: step_10, step_20, step_30." in notes(app)


def test_one_filter_is_said_where_it_acts(folder):
    _, caption = shown(opened("trends", source="folder", domain="code", trend="max_violation"))
    assert "domain: code" in caption

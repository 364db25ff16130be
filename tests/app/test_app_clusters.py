"""The Clusters page through AppTest: with and without vectors, with maps, read-only, bad links."""

import sys

import numpy as np
import pytest
import streamlit as st
from app_pages import charts, notes, opened
from synthetic import write_run

from explorer import open_run, writing
from explorer.maps import map_cache
from explorer.maps.data import Source, prepare
from explorer.maps.map_cache import MapOptions
from explorer.slices import list_slices

pytestmark = pytest.mark.slow

SOURCE = Source("tokens", "scores", 1)


@pytest.fixture(autouse=True)
def _clean():
    yield
    st.cache_resource.clear()
    st.cache_data.clear()
    writing.configure(writing.Policy())


@pytest.fixture
def runs(tmp_path, monkeypatch, worker):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    return tmp_path


@pytest.fixture
def known(runs):
    return write_run(runs / "known.duckdb", level="scores")


def keep(path, source=SOURCE):
    """Put a map and clusters into the cache as the worker would; return the places."""
    with open_run(path) as run:
        prepared = prepare(run, source)
    n = len(prepared.ids)
    places = np.stack([np.arange(n), np.arange(n) % 3], axis=1).astype(np.float32)
    facts = {"trustworthiness": 0.93, "trustworthiness_pca": 0.61}
    where = map_cache.map_path(prepared.digest, MapOptions())
    map_cache.write(where, {"x": places[:, 0], "y": places[:, 1]}, facts)
    where = map_cache.clusters_path(prepared.digest, "kmeans", 12, 0)
    found = {"n_clusters": 3, "fitted": n, "converged": True, "noise": 0.0}
    domains = {"nmi": 0.42, "floor": 0.11, "floor_high": 0.15}
    labels = {"cluster": (np.arange(n) % 3).astype(np.int32)}
    map_cache.write(where, labels, {**found, "domains": domains})
    return prepared, places


def region_of(prepared, text, layout="u"):
    return f"{prepared.digest[:8]}{layout}:{text}"


def numbers(app):
    return {metric.label: metric.value for metric in app.metric}


def test_the_pca_is_shown_at_once_and_the_map_is_asked_for(known, worker):
    app = opened("clusters", layer="1")
    (figure,) = charts(app)
    assert "PCA of tokens: router scores of layer 1" in figure.spec
    requests = [job.request for job in worker.jobs()]
    assert [r.method for r in reversed(requests)] == ["", "kmeans"]
    assert {r.source for r in requests} == {Source("tokens", "scores", 1)}
    assert numbers(app)["Trustworthiness"] == "–"
    # another visit waits for the same jobs
    opened("clusters", layer="1")
    assert len(worker.jobs()) == 2


def test_a_kept_map_is_shown_with_its_quality(known, worker):
    keep(known.path)
    app = opened("clusters", layer="1")
    assert not worker.jobs()
    (figure,) = charts(app)
    assert "UMAP of tokens: router scores of layer 1" in figure.spec
    shown = numbers(app)
    assert (shown["Trustworthiness"], shown["NMI with domains"]) == ("0.93", "0.42")
    said = " ".join(caption.value for caption in app.caption)
    assert "By chance 0.11 (95% below 0.15)" in said and "of the PCA: 0.61" in said
    assert "click a point to go to it" in said


@pytest.mark.parametrize("point", ["tokens expert", "tokens entropy", "tokens cluster"])
def test_tokens_are_coloured(known, point):
    check_colour(*point.split())


@pytest.mark.parametrize("point", ["prompts domain", "prompts entropy", "experts layer"])
def test_prompts_and_experts_are_coloured(known, point):
    check_colour(*point.split())


@pytest.mark.parametrize("hue", ["ratio", "domain"])
def test_experts_have_colours_of_their_own(known, hue):
    check_colour("experts", hue)


def test_a_change_of_what_is_mapped_puts_the_colour_back(known):
    app = opened("clusters", map="experts", hue="ratio")
    app.button_group(key="address:map").set_value("tokens").run()
    assert not app.exception and "hue" not in app.query_params
    assert "The link asks" not in notes(app)


def check_colour(unit, hue):
    app = opened("clusters", map=unit, hue=hue)
    assert not app.error and len(charts(app)) == 1
    assert f"of {unit}" in charts(app)[0].spec


def test_without_vectors_the_page_says_how_to_record_them(runs, worker):
    write_run(runs / "known.duckdb", scored_every=0)
    app = opened("clusters")
    assert "no router inputs and no scores" in notes(app)
    assert "--sample-tokens" in app.code[0].value
    assert not charts(app) and not worker.jobs()
    # prompts need ids alone
    assert len(charts(opened("clusters", map="prompts"))) == 1


def test_at_level_stats_there_is_no_map_of_anything(runs, worker):
    write_run(runs / "known.duckdb", level="stats", scored_every=0)
    for unit in ("prompts", "experts"):
        app = opened("clusters", map=unit)
        assert "--level ids" in notes(app) and not charts(app)
    assert not worker.jobs()


def test_a_region_lists_its_tokens_and_what_is_over_represented(known):
    prepared, places = keep(known.path)
    inside = (places[:, 0] >= 2) & (places[:, 0] <= 9) & (places[:, 1] <= 1)
    address = region_of(prepared, "2.0000_-0.5000~9.0000_1.0000")
    app = opened("clusters", layer="1", region=address)
    (title,) = [head.value for head in app.subheader if "Selected" in head.value]
    assert title == f"Selected: {inside.sum()} of {len(places)} tokens"
    (table,) = [frame.value for frame in app.dataframe]
    by_id = {token["token_id"]: token for token in known.tokens}
    ids = prepared.ids[inside, 0].tolist()
    assert table["Position"].tolist() == [by_id[token]["position"] for token in ids]
    assert table["Expert"].tolist() == [
        f"L1.0.E{known.routes[token, 1, 0]['experts'][0][0]}" for token in ids
    ]
    # a filter leaves some of them
    app = opened("clusters", layer="1", region=address, domain="law")
    law = [token for token in ids if by_id[token]["domain"] == "law"]
    assert len(app.dataframe[0].value) == len(law) < len(ids)


def test_a_selection_is_saved_as_a_slice(known, worker):
    prepared, places = keep(known.path)
    address = region_of(prepared, "2.0000_-0.5000~9.0000_1.0000")
    app = opened("clusters", layer="1", region=address)
    named = next(box for box in app.text_input if box.label == "Save as slice")
    named.set_value("a corner")
    next(button for button in app.button if button.label == "Save slice").click()
    app.run()
    assert "a corner" in " ".join(box.value for box in app.success)
    with open_run(known.path) as run:
        (info,) = list_slices(run)
    inside = (places[:, 0] >= 2) & (places[:, 0] <= 9) & (places[:, 1] <= 1)
    assert (info.name, info.n_tokens) == ("a corner", inside.sum())


def test_a_region_of_another_map_and_a_bad_one_select_nothing(known):
    prepared, _ = keep(known.path)
    for address in (
        region_of(prepared, "0_0~9_9", layout="p"),
        "00000000u:0_0~9_9",
        region_of(prepared, "<script>"),
    ):
        app = opened("clusters", layer="1", region=address)
        assert not [head for head in app.subheader if "Selected" in head.value]


def test_a_read_only_server_makes_no_map_and_writes_none(runs, known, worker, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--read-only"])
    app = opened("clusters", layer="1")
    assert "writes nothing" in notes(app)
    assert not worker.jobs() and not (runs / "cache").exists()
    assert len(charts(app)) == 1
    prepared, _ = keep(known.path)
    app = opened("clusters", layer="1", region=region_of(prepared, "0.0000_0.0000~9.0000_9.0000"))
    assert "UMAP" in charts(app)[0].spec
    assert not [button for button in app.button if button.label == "Save slice"]


def test_a_failed_job_says_why_and_can_be_tried_again(known, worker):
    opened("clusters", layer="1")
    for job in list(worker._jobs.values()):
        job.state, job.error = "failed", "out of *luck*"
    app = opened("clusters", layer="1")
    assert "out of \\*luck\\*" in app.warning[0].value
    app.button(key="again UMAP").click().run()
    assert worker.jobs()[0].active and worker.jobs()[0].request.method == ""


def test_many_points_become_a_density_map(known, monkeypatch):
    keep(known.path)
    monkeypatch.setattr("explorer.pages.clusters.points.MAX_POINTS", 5)
    import explorer.pages.clusters.points as component

    assert component.MAX_POINTS == 5
    for query in ({}, {"value": "law"}, {"hue": "entropy"}):
        app = opened("clusters", layer="1", **query)
        (figure,) = charts(app)
        assert '"type":"heatmap"' in figure.spec
        assert ("share of law" in figure.spec) == (query == {"value": "law"})

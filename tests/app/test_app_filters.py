"""The filters of all pages: in the address, in the counts, in the captions, and taken off."""

import json
import re

import numpy as np
import pytest
import streamlit as st
from app_pages import charts, notes, opened, query
from synthetic import SITES, write_run

from explorer import slices, writing
from explorer.run import open_run

pytestmark = pytest.mark.slow

PAGES = ("overview", "tokens", "experts", "load_balance", "attention", "flow")
NAME = "<b>rare</b> % words"
IDS = [0, 2, 5, 20, 24]
DEEP = tuple(SITES[1]._replace(layer=layer) for layer in (1, 2, 3, 5))


def with_slice(folder):
    """Write a run and a slice of it."""
    written = write_run(folder / "known.duckdb", level="attention")
    with open_run(written.path) as run:
        slices.save_slice(run, NAME, IDS, note="<i>look</i>", author="me")
    return written


@pytest.fixture
def known(show):
    return show(with_slice)


@pytest.fixture
def own(runs):
    """Write the run where no other test reads it."""
    return with_slice(runs)


def captions(app):
    """Return the captions of the figures of a page."""
    found = []
    for chart in charts(app):
        text = json.loads(chart.spec)["layout"]["title"].get("subtitle", {}).get("text", "")
        found.append(text.replace("<br>", "; "))
    return found


def filtered(app):
    """Return the first caption of a figure that filters act on: two sides of a text are whole."""
    return next(caption for caption in captions(app) if "no filters" not in caption)


def tokens_of(app):
    return next(tile.value for tile in app.metric if tile.label == "Tokens")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(
    ("filters", "words"),
    [({"search": "COURT"}, "prompts with “COURT”"), ({"slice": NAME}, "slice “&lt;b&gt;rare")],
    ids=["search", "slice"],
)
def test_every_page_says_which_part_it_shows(known, page, filters, words):
    app = opened(page, **filters)
    assert not app.error and not notes(app).count("not here")
    of_one_prompt = ("tokens",)  # its figures are of the prompt that was chosen
    told = [caption for caption in captions(app) if words in caption]
    assert bool(told) is (page not in of_one_prompt)
    for name, value in filters.items():
        assert query(app, name) == value


def test_the_counts_are_those_of_the_part(known):
    part = [t for t in known.tokens if t["prompt_id"] == 0]
    app = opened("overview", search="court")
    assert tokens_of(app) == str(len(part))
    assert f"n = {len(part)} tokens of prompts with “court”" in captions(app)[0]
    assert tokens_of(opened("overview", slice=NAME)) == str(len(IDS))
    both = opened("overview", slice=NAME, search="court", phase="prompt")
    assert tokens_of(both) == "3"
    assert tokens_of(opened("overview")) == str(len(known.tokens))


def test_what_was_searched_for_is_marked_in_the_text(known):
    app = opened("tokens", search="T S", prompt="0")
    strips = [json.loads(element.proto.json) for element in app.get("bidi_component")]
    (strip,) = [strip for strip in strips if "levels" in strip]
    marked = [text for text, found in zip(strip["texts"], strip["found"], strict=True) if found]
    assert marked == [" court", " shall"]


def test_a_part_without_tokens_is_told_and_can_be_left(known):
    app = opened("flow", search="court", domain="code")
    assert "No token matches all the filters" in notes(app)
    assert not charts(app)
    next(b for b in app.button if b.label == "Take the filters off").click().run()
    assert charts(app)
    assert "search" not in app.query_params and "domain" not in app.query_params


def test_typing_a_text_changes_the_address_and_the_page(known):
    app = opened()
    app.text_input(key="address:search").set_value("größe").run()
    assert query(app, "search") == "größe"
    assert tokens_of(app) == "5"
    app.text_input(key="address:search").set_value("").run()
    assert "search" not in app.query_params


def test_the_tokens_page_lists_the_prompts_of_the_part(known):
    app = opened("tokens", search="court", prompt="5")
    assert len(app.selectbox(key="address:prompt").options) == 1
    assert "which is not here" in notes(app)
    assert "token" not in app.query_params
    app = opened("tokens", slice=NAME)
    prompts = {t["prompt_id"] for t in known.tokens if t["token_id"] in IDS}
    assert len(app.selectbox(key="address:prompt").options) == len(prompts)


def many_layers(folder):
    return write_run(folder / "deep.duckdb", level="attention", sites=DEEP)


@pytest.fixture
def deep(show):
    return show(many_layers)


def two_of_many_layers(folder):
    many_layers(folder)
    write_run(folder / "other.duckdb", level="attention", sites=DEEP)


SERVING = {"topic": "serving", "layer": "1.0"}


def read_captions(app):
    """Return the captions of what decode batches read, and of coverage."""
    titles = [json.loads(chart.spec)["layout"]["title"]["text"] for chart in charts(app)]
    named = dict(zip(titles, captions(app), strict=True))
    return [
        next(text for title, text in named.items() if title.startswith(start))
        for start in ("Experts that a decode batch reads", "Coverage")
    ]


@pytest.mark.parametrize(
    ("filters", "mine"),
    [
        ({}, lambda t: t["phase"] == "generated"),
        ({"phase": "prompt"}, lambda t: t["phase"] == "prompt"),
        ({"domain": "law"}, lambda t: t["domain"] == "law" and t["phase"] == "generated"),
        # of the only prompt of this domain nothing was generated
        ({"domain": "text"}, lambda t: t["domain"] == "text"),
        ({"search": "COURT", "phase": "prompt"}, lambda t: t["token_id"] < 6),
        ({"slice": NAME, "phase": "prompt"}, lambda t: t["token_id"] in IDS),
    ],
    ids=["all", "phase", "domain", "nothing generated", "search", "slice"],
)
def test_decode_batches_are_of_the_tokens_that_the_caption_names(known, filters, mine):
    wanted = [t for t in known.tokens if mine(t)]
    phase = wanted[0]["phase"]
    for caption in read_captions(opened("load_balance", **SERVING, **filters)):
        assert f"n = {len(wanted)} tokens of" in caption
        assert f"phase {phase}" in caption
        for name, value in filters.items():
            said = {"search": "“COURT”", "slice": "slice “&lt;b&gt;rare"}.get(name, value)
            assert said in caption
        assert " of 6" not in caption  # none was left out


def test_serving_says_how_many_tokens_it_reads(own, monkeypatch):
    from explorer.pages.load_balance import serving

    monkeypatch.setattr(serving, "MAX_TOKENS", 9)
    n = sum(t["phase"] == "prompt" for t in own.tokens)
    for caption in read_captions(opened("load_balance", phase="prompt", **SERVING)):
        assert "n = 21 tokens of phase prompt" in caption
        assert f"the first 21 of {n}" in caption


WAYS = {
    "experts": {"ids": "same", "by": "experts"},
    "tokens": {"ids": "same", "by": "tokens"},
    "models": {"ids": "unrelated"},
}


def compared(way, **filters):
    """Open the run and its copy beside each other."""
    return opened("compare_runs", run="known", against="other", **WAYS[way], **filters)


def with_copy(folder):
    write_run(folder / "other.duckdb", level="attention")
    return with_slice(folder)


@pytest.fixture
def copied(show):
    return show(with_copy)


@pytest.fixture
def own_copied(runs):
    return with_copy(runs)


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_are_compared_on_what_the_filters_leave(copied, way):
    app = compared(way)
    for name, value, mine, words in (
        ("domain", "law", lambda t: t["domain"] == "law", "domain law"),
        ("search", "COURT", lambda t: t["prompt_id"] == 0, "prompts with “COURT”"),
        ("slice", NAME, lambda t: t["token_id"] in IDS, "slice “&lt;b&gt;rare"),
    ):
        # answers are remembered, and that to other filters must not be given again
        assert words not in filtered(app)
        app.query_params[name] = value
        caption = filtered(app.run())
        wanted = [t for t in copied.tokens if mine(t)]
        prompts = {t["prompt_id"] for t in wanted}
        if way == "models":  # whole prompts, as far as they have text
            wanted = [t for t in copied.tokens if t["prompt_id"] in prompts and t["text"]]
        if way != "experts":
            wanted = [t for t in wanted if t["phase"] == "prompt"]
            assert "phase prompt" in caption
        if way == "tokens":
            assert len(app.selectbox(key="address:shared").options) == len(prompts)
        assert f"n = {len(wanted)} tokens of" in caption and words in caption
        del app.query_params[name]


def test_a_slice_is_of_one_run_and_a_search_of_both(copied):
    app = compared("experts", slice=NAME, search="court")
    assert any("counted without it" in caption.value for caption in app.caption)
    n = sum(t["prompt_id"] == 0 for t in copied.tokens)
    assert f"B: n = {n} tokens of prompts with “court”" in captions(app)[0]


def test_a_search_in_a_run_of_totals_is_said_not_to_act(own, runs):
    write_run(runs / "other.duckdb", level="stats")
    app = compared("experts", search="court")
    assert any("counted without the search" in caption.value for caption in app.caption)
    assert f"B: n = {len(own.tokens)} tokens" in captions(app)[0]


@pytest.mark.parametrize("way", ["tokens", "models"])
def test_only_prompts_are_compared_token_by_token_and_the_page_says_so(copied, way):
    app = compared(way, phase="generated")
    assert any("does not act" in caption.value for caption in app.caption)
    assert "phase prompt" in filtered(app) and "phase generated" not in filtered(app)


def test_weights_of_tokens_are_compared_when_asked_for(copied):
    names = [
        [trace["name"] for trace in json.loads(charts(app)[1].spec)["data"]]
        for app in (compared("tokens"), compared("tokens", read="weights"))
    ]
    assert [len(name) for name in names] == [4, 5]
    assert names[1][4].startswith("divergence of the weights")


@pytest.mark.parametrize("way", ["tokens", "models"])
def test_two_runs_without_a_prompt_of_the_filters_say_so(own, runs, monkeypatch, way):
    import synthetic

    monkeypatch.setattr(synthetic, "PROMPTS", (("law", ["Other"] * 6), *synthetic.PROMPTS[1:]))
    write_run(runs / "other.duckdb", level="attention")
    app = compared(way, search="court")
    assert "No prompt that both runs hold" in notes(app)
    assert not any("same stretches" in c.spec or "same tokens" in c.spec for c in charts(app))


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_are_compared_in_the_range_of_layers(show, way):
    show(two_of_many_layers)
    app = opened(
        "compare_runs", run="deep", against="other", **WAYS[way], **{"from": "2", "to": "3"}
    )
    layers = drawn_layers(app)
    assert layers and all(set(some) == {"2", "3"} for some in layers)
    assert all("layers 2 to 3" in caption for caption in captions(app))


def test_pages_say_how_many_prompts_and_tokens_they_compare(own_copied, monkeypatch):
    from explorer.pages.compare_runs import data

    for question, limit in (
        (data.token_divergence, {"max_rows": 15}),
        (data.two_models, {"max_prompts": 2}),
    ):
        limits = question.__kwdefaults__ | limit
        monkeypatch.setattr(question, "__kwdefaults__", limits)
    n = sum(t["phase"] == "prompt" for t in own_copied.tokens)
    assert f"5 of {n} common tokens" in filtered(compared("tokens"))
    app = compared("models")
    assert "of 2 of 6 prompts in common" in filtered(app)
    assert any("of 2 of 6 prompts in common" in caption.value for caption in app.caption)


def drawn_layers(app):
    """Return the layers on the axes of a page's figures over layers."""
    axes = [json.loads(chart.spec)["layout"] for chart in charts(app)]
    layers = [
        axis["ticktext"]
        for layout in axes
        for axis in (layout.get("xaxis", {}), layout.get("yaxis", {}))
        if axis.get("title", {}).get("text", "").startswith("decoder layer") and "ticktext" in axis
    ]
    return layers


@pytest.mark.parametrize("page", PAGES)
def test_every_page_draws_the_range_of_layers_only(deep, page):
    app = opened(page, about="all", **{"from": "2", "to": "3"})
    assert not app.error and not notes(app).count("not here")
    assert app.selectbox(key="address:layer").options == ["Layer 2", "Layer 3"]
    assert all(set(layers) <= {"2", "3"} for layers in drawn_layers(app))
    if page != "flow":
        assert drawn_layers(app)
        assert any("layers 2 to 3" in caption for caption in captions(app))


def test_tiles_over_layers_are_those_of_the_range(deep):
    app = opened("overview", **{"from": "2", "to": "3"})
    dead = next(tile for tile in app.metric if tile.label == "Dead experts")
    assert dead.value.endswith(" of 12")


def test_narrowing_the_range_lets_go_of_what_is_outside(deep):
    app = opened("overview", layer="5")
    app.selectbox(key="address:to").set_value("3").run()
    assert query(app, "to") == "3"
    assert "layer" not in app.query_params and not notes(app)
    app.selectbox(key="address:from").set_value("5").run()
    assert query(app, "from") == "5" and "to" not in app.query_params and not notes(app)
    assert app.selectbox(key="address:layer").options == ["Layer 5"]
    app.selectbox(key="address:from").set_value("1").run()
    assert not {"from", "to"} & set(app.query_params)


@pytest.mark.parametrize("ends", [{"from": "4"}, {"to": "x"}, {"from": "3", "to": "1"}], ids=str)
def test_a_range_that_is_not_there(deep, ends):
    app = opened("overview", **ends)
    assert "which is not here" in notes(app)
    assert (
        list({"from", "to"} & set(app.query_params)) == [name for name in ends if len(ends) > 1][:1]
    )


def test_a_slice_that_is_not_there_and_one_of_another_recording(own):
    app = opened(slice="nothing")
    assert "which is not here" in notes(app)
    st.cache_data.clear()
    st.cache_resource.clear()
    own.path.unlink()
    write_run(own.path, level="scores")
    app = opened(slice=NAME)
    assert "which is not here" in notes(app)
    assert tokens_of(app) == str(len(own.tokens))


def test_a_slice_is_described_and_deleted_only_by_those_who_may(own):
    app = opened(slice=NAME)
    shown = " ".join(block.value for block in app.markdown)
    assert "5 tokens, saved by me" in shown and "\\<i\\>look" in shown
    (button,) = (b for b in app.button if b.label == "Delete the slice")
    button.click().run()
    assert "slice" not in app.query_params
    with open_run(own.path) as run:
        assert slices.list_slices(run) == []


def test_a_run_of_totals_knows_no_parts(runs):
    write_run(runs / "stats.duckdb", level="stats")
    app = opened(search="court", slice="x")
    assert "which level stats does not keep" in notes(app)
    assert not {"search", "slice"} & set(app.query_params)


def test_another_run_forgets_the_filters(own, runs):
    write_run(runs / "other.duckdb")
    app = opened(run="known", search="court", slice=NAME)
    app.selectbox(key="address:run").set_value("other").run()
    assert not {"search", "slice"} & set(app.query_params)


def test_large_parts_are_sampled_and_say_so(own, monkeypatch):
    from explorer.ui import state

    monkeypatch.setattr(state, "MAX_ROWS", 20)
    app = opened(search="a")
    (caption,) = captions(app)
    every = int(re.search(r"counted from every (\d+)", caption).group(1))
    counted = int(tokens_of(app).replace(",", ""))
    matching = [t for t in own.tokens if t["prompt_id"] not in (2, 3)]
    ids = np.array([t["token_id"] for t in own.tokens if t in matching])
    assert every > 1 and counted < len(ids)


def test_the_filters_are_refused_nothing_read_only(own, monkeypatch):
    from explorer.ui import access

    monkeypatch.setattr(access, "read_only_option", lambda: True)
    try:
        app = opened(slice=NAME)
        assert not [b for b in app.button if b.label == "Delete the slice"]
        assert tokens_of(app) == str(len(IDS))
    finally:
        writing.configure(writing.Policy())

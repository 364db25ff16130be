"""Names that look alike, and names that pages use for something else: they stay apart."""

import json
import sys

import pytest
import streamlit as st
import synthetic
from synthetic import write_run
from test_app_pages import charts, notes, opened, query

from explorer import open_run
from explorer.queries.overview import token_count
from explorer.text import visible
from explorer.ui.address import domain_key
from explorer.ui.wording import distinct, domain_labels, domain_name, labels, short

pytestmark = pytest.mark.slow

LONG = "a domain whose name is so long that it is cut, number "
# none, what pages call none, all or the rest, and two that are alike for forty characters
DOMAINS = (None, "(none)", "(no domain)", "All domains", LONG + "one", LONG + "two")


@pytest.fixture
def named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    prompts = [
        (domain, pieces) for domain, (_, pieces) in zip(DOMAINS, synthetic.PROMPTS, strict=True)
    ]
    monkeypatch.setattr(synthetic, "PROMPTS", prompts)
    write_run(tmp_path / "named.duckdb", level="scores")
    yield tmp_path / "named.duckdb"
    st.cache_resource.clear()


def strings(value):
    if isinstance(value, dict):
        return [text for one in value.values() for text in strings(one)]
    if isinstance(value, list):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) else []


def test_every_domain_can_be_chosen_and_shows_its_own_tokens(named):
    with open_run(named) as run:
        expected = {domain: token_count(run, domain=domain or "") for domain in DOMAINS}
    app = opened()
    options = app.selectbox(key="address:domain").options
    assert len(set(options)) == len(options) == 1 + len(DOMAINS)
    for domain, tokens in expected.items():
        app = opened(domain=domain_key(domain or ""))
        assert "The link asks" not in notes(app)
        (tile,) = (tile for tile in app.metric if tile.label == "Tokens")
        assert tile.value == str(tokens)


def test_a_click_on_the_load_of_a_domain_opens_that_domain(named):
    app = opened("load_balance", domain=domain_key("(none)"))
    assert query(app, "domain") == "=(none)"
    (figure,) = (c for c in charts(opened("load_balance")) if "Load by domain" in c.spec)
    rows = json.loads(figure.spec)["layout"]["yaxis"]["ticktext"]
    assert len(rows) == len(set(rows)) == len(DOMAINS)
    assert sum("no domain" in row for row in rows) == 2


@pytest.mark.parametrize("unit", ["tokens", "prompts"])
def test_a_map_has_a_colour_and_a_name_for_each_domain(named, unit):
    (figure,) = charts(opened("clusters", map=unit, layer="1.0"))
    names = [trace["name"] for trace in json.loads(figure.spec)["data"]]
    assert len(set(names)) == len(names) >= len(DOMAINS)


def test_a_key_of_an_address_is_of_one_domain():
    domains = ["", "(none)", "=(none)", "==(none)", "=", "none", "(no domain)"]
    keys = [domain_key(domain) for domain in domains]
    assert len(set(keys)) == len(keys) and "" not in keys
    # links that were sent before still mean the same
    assert keys[0] == "(none)"


def test_names_of_domains_are_all_different():
    domains = ["", "(no domain)", "“(no domain)”", "All domains", "(none)", LONG + "1", LONG + "2"]
    assert len({domain_name(domain) for domain in domains}) == len(domains)
    shown = domain_labels(domains)
    assert len(set(shown)) == len(domains) and shown[0] == "(no domain)"
    assert all(len(name) <= 46 for name in shown)


def test_a_text_that_says_that_there_is_none_is_a_text():
    texts = [None, "", "(no text)", "(text not recorded)", "“(no text)”"]
    assert len({visible(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    "texts",
    [
        ["x" * 30 + "a", "x" * 30 + "b"],
        ["a" * 50, "a" * 51, "a" * 52],
        ["head" + "x" * 50 + "tail", "head" + "y" * 50 + "tail"],
        ["a\n", "a↵"],
        ["a", "a (2)", "a"],
        ["<b>" * 20 + "1", "<b>" * 20 + "2"],
    ],
)
def test_different_texts_have_different_labels(texts):
    shown = labels(texts, limit=18)
    assert len(set(shown)) == len(set(texts))
    assert len(set(zip(shown, texts, strict=True))) == len(set(texts))
    assert not any("<" in text for text in shown)


def test_what_needs_no_cut_is_left_alone():
    assert short(["ab", "cd", "x" * 30], 10) == ["ab", "cd", "x" * 9 + "…"]
    assert distinct(["a", "b", "a"]) == ["a", "b", "a (2)"]
    assert distinct(["a", "a", "a (2)"]) == ["a", "a (3)", "a (2)"]


def test_choices_that_look_alike_are_told_apart(tmp_path, monkeypatch):
    """A widget hands over what it shows, so that the second of two alike would open the first."""
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    write_run(tmp_path / "a.duckdb")
    write_run(tmp_path / "b.duckdb")
    app = opened("compare_runs", run="a", by="tokens")
    options = app.selectbox(key="address:shared").options
    assert len(options) == len(set(options))
    st.cache_resource.clear()

"""The Learn page: every step with a live figure, the glossary, and the "?" of every figure."""

import ast
import json
import lzma
import re

import pytest
from app_pages import charts, notes, opened
from synthetic import write_run

from capture.demo import SAMPLE
from capture.prompts import read_prompts
from explorer.ui import address
from explorer.ui.glossary import FIGURES, TERMS, help_text, term_of
from explorer.worker.client import ROOT

pytestmark = pytest.mark.slow

STEPS = ("router", "load", "specialisation", "path")
FIGURED = ("overview", "tokens", "experts", "load_balance", "attention", "flow")


def with_attention(folder):
    return write_run(folder / "known.duckdb", level="attention")


@pytest.fixture
def known(show):
    return show(with_attention)


def links(app):
    return [link.proto for link in app.get("page_link")]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_a_figure_of_the_open_run(known, step):
    app = opened("learn", step=step, layer="1.0")
    assert not app.error and not notes(app)
    (chart,) = charts(app)
    assert json.loads(chart.spec)["data"]
    assert any(button.label.startswith("Next") for button in app.button)


def test_the_example_is_a_whole_word_and_its_choice_is_clear(runs):
    (runs / "sample.duckdb").write_bytes(lzma.decompress(SAMPLE.read_bytes()))
    app = opened("learn", layer="2")
    said = " ".join(block.value for block in app.markdown)
    word = re.search(r":primary-background\[·?(\w+)\]", said)[1]
    assert any(word in re.findall(r"\w+", prompt.text) for prompt in read_prompts("demo-sample"))
    assert re.search(r"It was sure|It leaned clearly", said)
    assert float(re.search(r"next expert by ([\d.]+) in score", said)[1]) >= 0.05


def test_the_tour_ends_in_a_text_of_ones_own(known):
    app = opened("learn", step="pages")
    next(button for button in app.button if button.label.startswith("Next")).click().run()
    (frame,) = app.get("iframe")
    assert frame.proto.src.startswith("/playground.html#embedded&theme=")
    assert {"Record your prompts as a run"} <= {link.label.strip("*") for link in links(app)}


def test_the_tour_goes_on_to_the_pages(known):
    app = opened("learn", step="path")
    next(button for button in app.button if button.label.startswith("Next")).click().run()
    assert not charts(app)
    shown = {link.label.strip("*") for link in links(app)}
    assert {"Overview", "Tokens", "Experts", "Load balance", "Attention", "Flow"} <= shown


def test_numbers_of_the_tour_are_those_of_the_run(known):
    app = opened("learn", step="load", layer="1.0")
    loads = [0] * 6
    for (_, layer, site), route in known.routes.items():
        if (layer, site) == (1, 0):
            for expert, _ in route["experts"]:
                loads[expert] += 1
    said = " ".join(block.value for block in app.markdown)
    assert f"**{max(loads) / (sum(loads) / 6):.2f}× its fair share**" in said
    assert f"L1.0.E{loads.index(max(loads))}" in said


def test_a_run_of_totals_has_a_tour_too(runs):
    write_run(runs / "stats.duckdb", level="stats")
    for step in STEPS:
        app = opened("learn", step=step)
        assert not app.error
    assert "keeps no single tokens" in notes(opened("learn"))


def test_the_word_that_was_asked_for_comes_first(known):
    app = opened("learn", term="divergence")
    assert app.markdown[0].value.startswith("**Divergence**")
    app = opened("learn", term="<b>x")
    assert "not in the glossary" in notes(app)


def test_the_glossary_lists_every_term(known):
    app = opened("learn")
    shown = [block.value for block in app.markdown]
    assert all(f"**{TERMS[name].title}**: {TERMS[name].text}" in shown for name in TERMS)


@pytest.mark.parametrize("page", FIGURED)
def test_every_figure_has_a_link_to_what_explains_it(known, page):
    app = opened(page, layer="1.0", run="known")
    asked = [link for link in links(app) if link.label == "?"]
    assert len(asked) == len(charts(app)) > 0
    for link in asked:
        assert link.page.endswith("learn")
        assert "run=known" in link.query_string and "layer=1.0" in link.query_string
        name = link.query_string.rpartition("term=")[2]
        assert link.help.startswith(help_text(name))


def test_terms_refer_to_terms():
    for name in TERMS:
        assert set(TERMS[name].also) <= set(TERMS)
    assert set(FIGURES.values()) <= set(TERMS)


def test_the_longest_beginning_counts():
    assert term_of("flow map") == "transition"
    assert term_of("together map") == "coactivation" and term_of("together") == "attention"
    assert term_of("something new") in TERMS


def test_the_page_has_an_address():
    assert address.PAGE_NAMES["learn"] == ("step", "term")


def keys_of_charts():
    """Yield how the key of every chart of the app begins, and whether that is all of it."""
    folders = (ROOT / "explorer" / "pages", ROOT / "explorer" / "ui")
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "chart":
                (key,) = [word.value for word in call.keywords if word.arg == "key"]
                parts = key.values if isinstance(key, ast.JoinedStr) else [key]
                if isinstance(parts[0], ast.Constant):
                    yield parts[0].value, len(parts) == 1


def test_every_figure_has_a_term_of_its_own():
    keys = list(keys_of_charts())
    assert len(keys) > 30
    for key, whole in keys:
        known = [name for name in FIGURES if key.startswith(name)]
        assert known or (not whole and any(name.startswith(key) for name in FIGURES)), key

"""Downloads say what they are of: the run, the layer and the filters, in name and columns."""

import io
import json
import sys

import duckdb
import pandas as pd
import pytest
import streamlit as st
from synthetic import write_run
from test_app_pages import charts, opened

from explorer.run import open_run
from explorer.slices import save_slice
from explorer.ui import chart as module
from explorer.ui.chart import csv, parquet, with_source
from explorer.ui.recipe import python, sql
from explorer.ui.wording import Scope

pytestmark = pytest.mark.slow


@pytest.fixture
def known(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path)])
    yield write_run(tmp_path / "known.duckdb", level="scores")
    st.cache_resource.clear()


@pytest.fixture
def exported(monkeypatch):
    """Return what each figure of a page offers: its file's name and its columns, by its key."""
    found = {}
    source = module._source

    def kept(figure, key):
        found[key] = source(figure, key)
        return found[key]

    monkeypatch.setattr(module, "_source", kept)
    return found


@pytest.fixture
def copied(monkeypatch):
    """Return the table of each figure of a page and the recipe of its code, by its key."""
    found, chart = {}, module.chart

    def drawn(figure, *, key, table, made=None, **options):
        found[key] = table, made
        return chart(figure, key=key, table=table, made=made, **options)

    monkeypatch.setattr(module, "chart", drawn)
    return found


PAGES_OF_CODE = {
    "load bars": ("load_balance", {"domain": "law", "search": "cOurt", "layer": "3.1"}),
    "load map": ("overview", {"slice": "it's", "from": "3"}),
    "token map": ("tokens", {"prompt": "1", "layer": "3.0"}),
    "shares by domain": ("experts", {"layer": "1.0", "id": "0"}),
}


@pytest.mark.parametrize("key", PAGES_OF_CODE)
def test_code_of_a_figure_makes_its_data(known, copied, monkeypatch, key):
    with open_run(known.path) as run:
        save_slice(run, "it's", [0, 1, 2, 5])
        page, query = PAGES_OF_CODE[key]
        opened(page, **query)
        table, (recipe, _) = copied[key]
        monkeypatch.chdir(known.path.parent)
        names = {}
        exec(python(recipe, known.path.name), names)
        names["run"].close()
        made = names["table"].reset_index(drop=True)
        pd.testing.assert_frame_equal(made, table.reset_index(drop=True))
        statement = sql(recipe, run)
    if not recipe.first and key != "shares by domain":
        with duckdb.connect(str(known.path), read_only=True) as plain:
            read = plain.sql(statement.removesuffix(";")).df()
        columns = [name for name in table.columns if name in read]
        assert set(columns) == set(table.columns)
        if recipe.layers:
            read = read[read["layer"].between(*recipe.layers)].reset_index(drop=True)
        pd.testing.assert_frame_equal(
            read[columns], table.reset_index(drop=True)[columns], check_dtype=False
        )


def test_the_code_is_written_when_its_menu_is_open(known):
    app = opened()
    assert not app.code
    app.session_state["code of load map"] = True
    app.run()
    assert [block.language for block in app.code] == ["python", "sql"]
    assert "expert_load(run, weights=False)" in app.code[0].value


def test_an_export_without_filters_is_named_after_its_run_and_figure(known, exported):
    app = opened()
    assert exported["load map"].file_name == "known-load-map"
    assert exported["load map"].columns == {"run": "known"}
    (figure,) = charts(app)
    assert json.loads(figure.config)["toImageButtonOptions"]["filename"] == "known-load-map"


def test_a_figure_for_a_paper_is_a_column_wide_and_names_its_run(known):
    app = opened()
    app.session_state["widths of figures"] = {"load map": "One column"}
    app.run()
    (figure,) = charts(app)
    layout, camera = (json.loads(text) for text in (figure.spec, figure.config))
    layout, camera = layout["layout"], camera["toImageButtonOptions"]
    assert (layout["width"], layout["autosize"]) == (round(3.5 * 96), False)
    assert camera["scale"] == pytest.approx(300 / 96)
    assert layout["title"]["subtitle"]["text"].replace("<br>", " ").endswith("run known")
    lines = [
        *layout["title"]["text"].split("<br>"),
        *layout["title"]["subtitle"]["text"].split("<br>"),
    ]
    assert len(lines) > 2 and max(map(len, lines)) <= round(3.5 * 96) / 5
    assert "click" not in " ".join(lines)


def test_an_export_carries_the_filters_of_its_figure(known, exported):
    opened("load_balance", domain="law", phase="prompt", search=" cOurt ", layer="3.1")
    made = exported["load bars"]
    assert made.file_name == ("known-load-bars-layer-3.1-domain-law-phase-prompt-search-cOurt")
    assert made.columns == {
        "run": "known",
        "of_layer": "3.1",
        "filter_domain": "law",
        "filter_phase": "prompt",
        "filter_search": " cOurt ",
    }


def test_a_filter_that_does_not_act_on_a_figure_is_not_said_of_it(known, exported):
    opened("load_balance", domain="law", phase="prompt", layer="1.0")
    # a capacity limit counts whole batches, whatever their domain
    assert exported["capacity"].columns == {
        "run": "known",
        "of_layer": "1.0",
        "filter_phase": "prompt",
    }
    opened("clusters", map="experts", domain="law", phase="prompt", to="1")
    (made,) = (made for key, made in exported.items() if key.startswith("map "))
    assert made.columns == {"run": "known", "filter_layers": "1 to 1"}


def test_prompts_without_a_domain_are_said_so(known, exported):
    opened(domain="(none)")
    assert exported["load map"].columns["filter_domain"] == "(no domain)"


def test_two_runs_are_both_named(known, exported, tmp_path):
    write_run(tmp_path / "b.duckdb")
    opened("compare_runs", run="known", against="b", domain="law")
    assert exported["load change"].columns == {
        "run": "known",
        "run_b": "b",
        "filter_domain_a": "law",
        "filter_domain_b": "law",
    }
    assert exported["load change"].file_name.startswith("known-b-load-change-domain_a-law")


def test_long_names_are_cut_and_stay_different(known, exported):
    names = []
    for search in ("a " * 90 + "1", "a " * 90 + "2"):
        source = module._file_name(["known", "load map", f"search {search}"])
        assert len(source) < 140
        names.append(source)
    assert names[0] != names[1]


def test_columns_of_provenance_stand_in_both_formats_and_replace_none():
    table = pd.DataFrame({"run": [1, 2], "x": [0.5, 1.5]})
    made = with_source(table, {"run": "known", "filter_domain": "=1+1"})
    assert list(table.columns) == ["run", "x"]
    for read in (pd.read_csv(io.BytesIO(csv(made))), pd.read_parquet(io.BytesIO(parquet(made)))):
        assert list(read.columns) == ["run", "x", "run_of_figure", "filter_domain"]
        assert read["run"].tolist() == [1, 2] and set(read["run_of_figure"]) == {"known"}
    # a text from outside begins no formula
    assert "'=1+1" in csv(made).decode()


def test_a_scope_says_its_filters_by_name():
    scope = Scope(7, "", "generated", False, "x", "s", True, 3, (1, 4))
    assert scope.caption().filters == {
        "domain": "(no domain)",
        "phase": "generated",
        "search": "x",
        "slice": "s",
        "tokens": "whole prompts",
        "layers": "1 to 4",
        "counted": "every 3rd token",
        "capture": "did not end",
    }
    assert Scope(7).caption().filters == {}

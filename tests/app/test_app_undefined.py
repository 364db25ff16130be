"""What is not defined is not called unrecorded: for one expert, and where all are chosen."""

import json
import math

import pandas as pd
import pytest
import streamlit as st
from app_pages import charts, opened
from synthetic import write_run

from capture.store import SiteInfo
from explorer.text import ABSENT_NOTE
from explorer.ui import chart, wording

ONE = (SiteInfo(0, 0, "model.layers.0.mlp", 1, 1, 0, "softmax"),)


@pytest.mark.parametrize(
    ("quantity", "n_experts", "top_k", "said"),
    [
        ("entropy", 1, 1, "not defined for one expert"),
        ("entropy", 2, 1, "not recorded"),
        ("margin", 1, 1, "not defined, as no expert is left out"),
        ("margin", 4, 4, "not defined, as no expert is left out"),
        ("margin", 4, 3, "not recorded"),
        ("expert", 1, 1, "no expert was chosen"),
        ("top1_weight", 4, 2, "no expert was chosen"),
        ("pinned_weight", 4, 2, "no expert is pinned there"),
    ],
)
def test_why_a_token_has_no_value(quantity, n_experts, top_k, said):
    assert wording.absent_gate(quantity, n_experts, top_k) == said


def test_a_choice_of_all_experts_has_no_margin():
    known = {"normalized_entropy": 0.5, "topk_mass": 1.0, "top_k": 2}
    said = wording.certainty_sentence(**known, margin=math.nan, n_experts=2)
    assert said.endswith("No expert is left out, so that no margin is defined.")
    said = wording.certainty_sentence(**known, margin=math.nan, n_experts=3)
    assert "margin" not in said


@pytest.mark.slow
def test_tokens_of_one_expert_say_what_is_not_defined(runs):
    write_run(runs / "few.duckdb", sites=ONE)
    app = opened("tokens", run="few", color="entropy")
    (panel,) = (text.value for text in app.markdown if "In layer 0 the router" in text.value)
    sentence = "With one expert there is no choice"
    assert sentence in panel and "not recorded" not in panel
    figures = [json.loads(figure.spec) for figure in charts(app)]
    (figure,) = (f for f in figures if "Each token at each layer" in f["layout"]["title"]["text"])
    assert "grey: not defined for one expert" in figure["layout"]["title"]["subtitle"]["text"]
    hovers = [trace.get("hovertemplate") or "" for trace in figure["data"]]
    assert any("not defined for one expert" in hover for hover in hovers)
    assert not any("not recorded" in hover for hover in hovers)
    step = opened("learn", run="few", step="router")
    assert any(sentence in text.value for text in step.markdown)


@pytest.mark.parametrize(("values", "said"), [([1.0, None], [ABSENT_NOTE]), ([1.0, 2.0], [])])
def test_a_dash_in_a_table_is_explained(monkeypatch, values, said):
    captions = []
    monkeypatch.setattr(st, "caption", captions.append)
    chart.explain_dash(pd.DataFrame({"a": values}))
    assert captions == said

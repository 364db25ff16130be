"""Figures: the data in the figure is the data in the frame, and nothing from outside is markup."""

import html
import importlib
import re
import sys
import tomllib

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from checks import dropped
from hypothesis import given
from hypothesis import strategies as st
from plotly.colors import sample_colorscale, unlabel_rgb
from synthetic import NASTY, write_run

from explorer import figures as api
from explorer.errors import ExplorerError, RunError, UnknownNameError
from explorer.metrics import load as load_metrics
from explorer.metrics.capacity import POLICIES
from explorer.pages.load_balance import data
from explorer.pages.load_balance import figures as load_figures
from explorer.pages.tokens import data as tokens
from explorer.pages.tokens import figures as token_figures
from explorer.pages.trends.figures import trend_lines
from explorer.queries import load
from explorer.queries.overview import token_count
from explorer.run import open_run
from explorer.text import visible
from explorer.ui import heatmap, theme
from explorer.ui.wording import Scope, domain_label, label
from explorer.worker.client import ROOT

SCOPE = Scope(33)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("run") / "known.duckdb").path
    with open_run(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def routed(run):
    return load.routing(run, 1)


def trace(figure, name):
    return next(part for part in figure.data if part.name == name)


def heat(figure):
    return next(part for part in figure.data if isinstance(part, go.Heatmap))


def texts(node):
    """Yield every string of a figure's JSON that plotly may draw as text."""
    if isinstance(node, dict):
        for value in node.values():
            yield from texts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from texts(value)
    elif isinstance(node, str):
        yield node


def title(figure):
    return figure.layout.title.text


def caption(figure):
    return figure.layout.title.subtitle.text.replace("<br>", "; ")


@pytest.fixture(scope="module")
def figures(run, routed):
    """One of each figure, from a run full of markup."""
    every = load.expert_load(run)
    one = load.expert_load(run, layer=1)
    by_domain = load.expert_load_by_domain(run, 1)
    by_domain.loc[by_domain["domain"] == "code", "domain"] = "<b>code</b>"
    curve = data.capacity_table(routed, 6, [0.5, 1.0, 2.0])
    scope = Scope(33, domain="<i>law</i>", phase="prompt")
    entropy = tokens.QUANTITIES["entropy"]
    return {
        "load_heatmap": load_figures.load_heatmap(every, scope=scope),
        "load_bars": load_figures.load_bars(one, scope=scope),
        "lorenz": load_figures.lorenz(one, scope=scope),
        "domain_heatmap": load_figures.domain_heatmap(
            by_domain,
            caption=scope.caption(f"1× = uniform share {load_figures.uniform_text(by_domain)}"),
        ),
        "balance": load_figures.balance_over_layers(
            load.balance_table(every, n_tokens=33), "gini", scope=scope
        ),
        "capacity": load_figures.capacity_curve(
            curve, layer="1", capacity_factor=1.0, zero_from=2.5, n_batches=6, scope=scope
        ),
        "token_layer": token_figures.token_layer_heatmap(
            tokens.token_quantity(run, 4, "entropy"), entropy, scope=scope
        ),
        "token_routes": token_figures.token_routes(tokens.token_experts(run, 16), token_text=NASTY),
        "score_bars": token_figures.score_bars(
            tokens.token_scores(run, 3, 1), layer="1", token_text=NASTY, unit="logit"
        ),
    }


# ---- text


def test_what_shows_nothing_is_made_visible():
    assert visible("a\n\tb") == "a↵⇥b"
    assert visible("\x00\x7f") == "␀␡"
    # right-to-left override, zero-width space, zero-width joiner, byte order mark
    assert visible("\u202e\u200b\u200d\ufeff") == "⟦U+202E⟧⟦U+200B⟧⟦U+200D⟧⟦U+FEFF⟧"
    assert visible("\u2028\u00a0\u3164") == "⟦U+2028⟧⟦U+00A0⟧⟦U+3164⟧"
    assert visible(" a b", spaces=True) == "·a·b"
    assert visible("") == "(no text)" and visible(None) == "(text not recorded)"
    assert visible("Größe 🙂 מילה") == "Größe 🙂 מילה"
    assert domain_label("") == "(no domain)" and domain_label("<b>") == "&lt;b&gt;"


@given(st.text(max_size=60))
def test_labels_hold_no_markup_and_no_hidden_character(text):
    shown = label(text)
    assert "<" not in shown and ">" not in shown and '"' not in shown
    assert re.sub(r"&(amp|lt|gt|#34|#x27);", "", shown).count("&") == 0
    assert len(html.unescape(shown)) <= 40
    assert not any(ord(character) < 0x20 or character in "\u202e\u200b" for character in shown)


# ---- what every figure says


def test_every_title_has_a_unit(figures):
    for name, figure in figures.items():
        assert "(" in title(figure), name


def test_every_figure_says_how_many_tokens(figures):
    for name, figure in figures.items():
        if name in ("token_routes", "score_bars"):
            assert "n = 1 token" in caption(figure), name
        else:
            expected = "n = 33 tokens of domain &lt;i&gt;law&lt;/i&gt;, phase prompt"
            assert caption(figure).startswith(expected), name


def test_every_load_figure_gives_the_uniform_baseline(figures):
    assert "uniform share 1/4 or 1/6" in caption(figures["load_heatmap"])
    assert "uniform share 16.67%" in caption(figures["load_bars"])
    assert "uniform" in caption(figures["lorenz"])
    assert "uniform share 1/6" in caption(figures["domain_heatmap"])
    assert "uniform routing" in caption(figures["balance"])
    assert "uniform load drops nothing" in caption(figures["capacity"])


def test_nothing_from_outside_is_markup(figures):
    for name, figure in figures.items():
        for text in texts(figure.to_plotly_json()):
            assert "<script" not in text and "<i>" not in text and "<b>" not in text, (name, text)
            assert "\u202e" not in text and "\u200b" not in text, name


def test_axes_are_titled_and_zoom_is_kept(figures):
    for name, figure in figures.items():
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text, name
        assert figure.layout.uirevision, name
    # what a figure was given before stays, too
    given = theme.finish(go.Figure(layout={"margin": {"b": 16}}), title="", caption="", dark=False)
    assert given.layout.margin.b == 16 and given.layout.margin.t > 0


def test_an_unfinished_capture_is_named():
    assert "did not end" in Scope(5, complete=False).caption()
    assert Scope(1).caption("note") == "n = 1 token; note"
    assert Scope(1234, domain="").caption().startswith("n = 1,234 tokens of domain (no domain)")


def test_long_captions_are_broken_between_parts():
    parts = ["x" * 60, "y" * 60, "z"]
    lines = theme.wrapped("; ".join(parts))
    assert lines == ["x" * 60, f"{'y' * 60}; z"]


@pytest.mark.parametrize("dark", [False, True])
def test_figures_carry_their_theme(run, dark):
    figure = load_figures.load_bars(load.expert_load(run, layer=1), scope=SCOPE, dark=dark)
    ground = figure.layout.template.layout.paper_bgcolor
    assert ground == ("#0e1117" if dark else "#ffffff")


# ---- heatmaps


def click_points(figure):
    """Return {(x, y): ids} of the click layers."""
    return {
        (int(x), int(y)): list(ids)
        for part in figure.data
        if part.name is not None and part.name.startswith("cells")
        for x, y, ids in zip(part.x, part.y, part.customdata, strict=True)
    }


@pytest.mark.parametrize("experts", [4, 101])
def test_every_cell_is_clicked_though_one_marker_is_drawn(experts):
    rows = [
        {"layer": layer, "site": 0, "expert_id": expert, "n_experts": experts, "top_k": 1,
         "assignments": expert + 1, "share": 0.1, "ratio": 1.0}
        for layer in range(20) for expert in range(experts)
    ]  # fmt: skip
    figure = load_figures.load_heatmap(pd.DataFrame(rows), scope=SCOPE, order="load")
    assert [type(part) for part in figure.data] == [go.Heatmap, go.Scatter]
    assert figure.data[1].marker.maxdisplayed == 1
    assert len(click_points(figure)) == 20 * experts
    # by falling load: the last expert comes first
    assert click_points(figure)[0, 3][:3] == [3, 0, experts - 1]


def test_load_heatmap_holds_the_load(run):
    frame = load.expert_load(run)
    figure = load_figures.load_heatmap(frame, scope=SCOPE)
    z = np.asarray(heat(figure).z)
    assert z.shape == (3, 6)
    points = click_points(figure)
    assert len(points) == len(frame)
    sites = [(1, 0), (3, 0), (3, 1)]
    for row in frame.to_dict("records"):
        x, y = row["expert_id"], sites.index((row["layer"], row["site"]))
        # an idle expert is at the lower end of the scale, not missing
        expected = np.log2(max(row["ratio"], 1 / 8))
        assert z[y, x] == pytest.approx(expected)
        got = points[x, y]
        assert got[:3] == [row["layer"], row["site"], row["expert_id"]]
        assert got[3:6] == pytest.approx([row["share"], row["assignments"], row["ratio"]])
    # the third router has 4 experts: no value and no click beyond
    assert np.isnan(z[2, 4:]).all() and (4, 2) not in points
    assert figure.layout.yaxis.ticktext == ("1.0", "3.0", "3.1")
    # the first layer at the top, and all of every cell
    assert figure.layout.yaxis.range == (2.5, -0.5) and figure.layout.xaxis.range == (-0.5, 5.5)
    # neutral in the middle of a fixed, symmetric range
    assert (heat(figure).zmin, heat(figure).zmax) == (-3, 3)
    assert heat(figure).colorscale[3][0] == 0.5


def test_load_heatmap_by_falling_load_keeps_the_experts(run):
    frame = load.expert_load(run, layer=3, site=0)
    figure = load_figures.load_heatmap(frame, scope=SCOPE, order="load")
    points = click_points(figure)
    loads = [points[x, 0][4] for x in range(6)]
    assert loads == sorted(frame["assignments"], reverse=True)
    assert sorted(points[x, 0][2] for x in range(6)) == list(range(6))
    assert [points[x, 0][6] for x in range(6)] == [1, 2, 3, 4, 5, 6]


def test_at_most_eight_pins_have_a_colour():
    pins = [(0, 0, expert) for expert in range(10)]
    colors = theme.pin_colors([*pins, pins[0]], False)
    assert list(colors) == pins[:8] and len(set(colors.values())) == 8


def wide_load(n_layers, n_experts):
    rows = [
        (layer, 0, expert, n_experts, 8, expert, expert / n_experts, 1.0)
        for layer in range(n_layers)
        for expert in range(n_experts)
    ]
    columns = ["layer", "site", "expert_id", "n_experts", "top_k", "assignments", "share", "ratio"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize("n_experts", [8, 60, 64, 128, 256])
def test_labels_stay_readable_with_many_experts(n_experts):
    figure = load_figures.load_heatmap(wide_load(61, n_experts), scope=SCOPE)
    axis = figure.layout.xaxis
    assert len(axis.ticktext) <= 60
    assert len(set(axis.ticktext)) == len(axis.ticktext)
    assert [str(value) for value in axis.tickvals] == list(axis.ticktext)
    # 61 layers: thinned too
    assert len(figure.layout.yaxis.ticktext) <= 60
    assert len(click_points(figure)) == 61 * n_experts
    bars = load_figures.load_bars(wide_load(1, n_experts), scope=SCOPE)
    assert len(bars.layout.xaxis.ticktext) <= 60


def test_a_heatmap_that_a_browser_cannot_draw_is_refused():
    with pytest.raises(ExplorerError, match="60,000 cells"):
        load_figures.load_heatmap(wide_load(100, 601), scope=SCOPE)


def test_a_layer_without_load_is_missing_and_not_zero(run):
    frame = load.expert_load(run, domain="text", phase="generated")
    figure = load_figures.load_heatmap(frame, scope=Scope(0))
    assert np.isnan(np.asarray(heat(figure).z, dtype=float)).all()
    assert figure.layout.plot_bgcolor == theme.missing(False) != theme.missing(True)
    assert "no assignment" in trace(figure, "cells without a value").hovertemplate


@pytest.mark.parametrize("dark", [False, True])
def test_missing_cells_have_no_colour_of_the_scale(dark):
    scales = {
        True: [unlabel_rgb(c) for c in sample_colorscale(theme.SEQUENTIAL, np.linspace(0, 1, 99))],
        False: [theme.color_at(part, dark) for part in np.linspace(0, 1, 99)],
    }
    for sequential, colors in scales.items():
        grey = theme.missing(dark, sequential=sequential)
        far = np.abs(np.array(colors) - [int(grey[at : at + 2], 16) for at in (1, 3, 5)]).sum(1)
        # the least that is told apart beside each other: about 6 of 255 in each channel
        assert far.min() >= 18, (grey, far.min())


def luminance(color):
    parts = np.array(color) / 255
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(*colors):
    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme_name", ["light", "dark"])
def test_tokens_are_read_on_every_tint(theme_name):
    """WCAG asks for 4.5 between text and its ground."""
    colors = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())["theme"][theme_name]
    style = (ROOT / "explorer/ui/token_strip.css").read_text()
    (tint,) = re.findall(r"calc\(var\(--level\) \* ([0-9]+)%\)", style)
    text, ground, level = (
        np.array([int(colors[name][at : at + 2], 16) for at in (1, 3, 5)])
        for name in ("textColor", "backgroundColor", "primaryColor")
    )
    hues = [
        np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
        for color in theme.hues(theme_name == "dark")
    ]
    for hue in (level, *hues):
        full = ground + (hue - ground) * int(tint) / 100
        assert contrast(text, full) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_lines_of_checkpoints_are_seen_on_their_ground(dark):
    rows = [
        {"name": name, "step": step, "stage": 1, "layer": layer, "site": 0, "saturation": 0.5,
         "chance": 0.1}
        for layer in range(12)
        for step, name in ((1, "a"), (2, "b"))
    ]  # fmt: skip
    figure = trend_lines(pd.DataFrame(rows), "saturation", caption="", dark=dark)
    ground = [int(theme.ground(dark)[at : at + 2], 16) for at in (1, 3, 5)]
    for line in figure.data:
        # WCAG asks for 3 of what is not text
        assert contrast(ground, unlabel_rgb(line.line.color)) >= 3


def test_domain_heatmap_holds_the_load(run):
    frame = load.expert_load_by_domain(run, 1)
    figure = load_figures.domain_heatmap(frame, caption="")
    domains = ["code", "law", "text", ""]
    points = click_points(figure)
    for row in frame.to_dict("records"):
        place = domains.index(row["domain"])
        got = points[row["expert_id"], place]
        assert got == pytest.approx(
            [1, 0, row["expert_id"], row["share"], row["assignments"], row["ratio"], place]
        )
    totals = frame.groupby("domain")["assignments"].sum()
    names = ["code", "law", "text", "(no domain)"]
    assert list(figure.layout.yaxis.ticktext) == [
        f"{name} ({totals[domain]})" for name, domain in zip(names, domains, strict=True)
    ]


# ---- load and balance


def test_load_bars_fall_and_hold_the_load(run):
    frame = load.expert_load(run, layer=1).sort_values("assignments", ascending=False)
    figure = load_figures.load_bars(frame, scope=SCOPE)
    bars = figure.data[0]
    assert list(bars.y) == pytest.approx(sorted(frame["share"], reverse=True))
    experts = [int(ids[2]) for ids in bars.customdata]
    shares = dict(zip(frame["expert_id"], frame["share"], strict=True))
    assert list(bars.y) == pytest.approx([shares[expert] for expert in experts])
    assert [int(text) for text in figure.layout.xaxis.ticktext] == experts
    assert figure.layout.shapes[0].y0 == pytest.approx(1 / 6)


def test_lorenz_is_the_curve_of_the_metric(run):
    frame = load.expert_load(run, layer=1)
    figure = load_figures.lorenz(frame, scope=SCOPE)
    curve = load_metrics.lorenz_curve(frame["assignments"])
    assert np.allclose(trace(figure, "measured").y, curve.load)
    assert np.allclose(trace(figure, "measured").x, curve.experts)


def test_balance_table_holds_metrics_and_floors(run):
    frame = load.expert_load(run)
    table = load.balance_table(frame, n_tokens=33)
    assert list(zip(table["layer"], table["site"], strict=True)) == [(1, 0), (3, 0), (3, 1)]
    for row in table.to_dict("records"):
        part = frame[(frame["layer"] == row["layer"]) & (frame["site"] == row["site"])]
        counts = part["assignments"].to_numpy()
        assert row["assignments"] == counts.sum()
        for name in load_metrics.LOAD_METRICS:
            assert row[name] == pytest.approx(load_metrics.LOAD_METRICS[name](counts))
            low, mean, high = (row[f"{name}_floor{end}"] for end in ("_low", "", "_high"))
            assert low <= mean <= high or np.isclose(low, high)
    empty = load.balance_table(load.expert_load(run, domain="none of these"), n_tokens=0)
    assert empty["gini"].isna().all() and empty["gini_floor"].isna().all()
    # no load is no knowledge of dead experts either
    assert empty["dead_experts"].isna().all()


@pytest.mark.parametrize("metric", list(load_metrics.LOAD_METRICS))
def test_balance_over_layers_holds_the_table(run, metric):
    table = load.balance_table(load.expert_load(run), n_tokens=33)
    figure = load_figures.balance_over_layers(table, metric, scope=SCOPE)
    measured = trace(figure, "measured")
    add = 1 if metric == "max_violation" else 0  # pages count the busiest expert in fair shares
    assert list(measured.y) == pytest.approx((table[metric] + add).tolist())
    assert [list(ids) for ids in measured.customdata] == [[1, 0], [3, 0], [3, 1]]
    assert list(trace(figure, "low").y) == pytest.approx(table[f"{metric}_floor_low"] + add)
    assert load_figures.METRIC_TEXTS[metric].label in title(figure)


def test_every_load_metric_has_its_words():
    assert list(load_figures.METRIC_TEXTS) == list(load_metrics.LOAD_METRICS)
    with pytest.raises(UnknownNameError):
        load_figures.METRIC_TEXTS["balance"]


def test_capacity_table_and_figure(routed):
    factors = [0.5, 1.0, 1.5, 4.0]
    table = data.capacity_table(routed, 6, factors)
    for row in table.to_dict("records"):
        for policy in POLICIES:
            drops = dropped(
                routed.expert_ids,
                6,
                row["capacity_factor"],
                policy=policy,
                weights=routed.weights,
                batch=routed.batch,
            )
            assert row["assignments"] == drops.assignments
            assert row[f"weight_{policy}"] == drops.weight
            assert row[f"tokens_{policy}"] == drops.tokens
    figure = load_figures.capacity_curve(
        table, layer="1", capacity_factor=1.25, zero_from=2.5, n_batches=6, scope=SCOPE
    )
    for column, name in (
        ("assignments", "assignments dropped (both policies)"),
        ("weight_probs", "combine weight dropped, policy probs"),
    ):
        assert list(trace(figure, name).y) == table[column].tolist()
        assert list(trace(figure, name).x) == factors
    assert figure.layout.shapes[0].x0 == 1.25
    assert "6 batches" in caption(figure) and "from factor 2.50 on" in caption(figure)


def test_smallest_safe_factor_is_one_plus_the_largest_maxvio_of_a_batch(routed):
    safe = data.smallest_safe_factor(routed, 6)
    violations = []
    for number in set(routed.batch.tolist()):
        ids = routed.expert_ids[routed.batch == number]
        violations.append(load_metrics.max_violation(np.bincount(ids[ids >= 0], minlength=6)))
    assert safe == pytest.approx(1 + max(violations))
    assert data.capacity_table(routed, 6, [safe])["assignments"].tolist() == [0]
    empty = routed._replace(expert_ids=np.full_like(routed.expert_ids, -1))
    assert np.isnan(data.smallest_safe_factor(empty, 6))


def test_floor_in_words():
    floor = load_metrics.Floor(0.1234, 0.1, 0.15)
    assert "0.123 (0.1 to 0.15" in load_figures.floor_note(floor)


# ---- tokens


def test_token_layer_heatmap_holds_the_values(run):
    frame = tokens.token_quantity(run, 4, "margin")
    figure = token_figures.token_layer_heatmap(frame, tokens.QUANTITIES["margin"], scope=SCOPE)
    z = np.asarray(heat(figure).z)
    assert np.allclose(z, frame["value"].to_numpy().reshape(3, 10), equal_nan=True)
    points = click_points(figure)
    assert points[3, 1][:4] == [3, 0, 19, 3]
    # sites without statistics can be clicked too, and say so
    assert (0, 2) in points and np.isnan(z[2]).all()
    assert "not recorded" in trace(figure, "cells without a value").hovertemplate
    # equal tokens stay apart: positions on the axis, texts as ticks
    assert list(figure.layout.xaxis.tickvals) == list(range(10))
    assert list(figure.layout.xaxis.ticktext).count("·a") == 6
    assert figure.layout.xaxis.ticktext[0] == html.escape(NASTY)


def test_experts_have_the_colour_of_their_id_or_of_their_rank():
    values = pd.DataFrame(
        {
            "token_id": [0, 1, 2, 3] * 2,
            "position": [0, 1, 2, 3] * 2,
            "text": list("abcd") * 2,
            "layer": [0] * 4 + [1] * 4,
            "site": 0,
            "value": [3.0, 1.0, np.nan, 1.0, 40.0, 7.0, 40.0, 2.0],
        }
    )
    groups = token_figures.expert_groups(values, {(0, 0): 8, (1, 0): 64})
    # a small router's experts by id; of a large one's, the most frequent comes first
    assert np.array_equal(groups, [3, 1, np.nan, 1, 0, 2, 0, 1], equal_nan=True)
    most = len(theme.categories(dark=False))
    many = pd.DataFrame({"layer": 0, "site": 0, "value": np.arange(most + 5.0)})
    assert (
        token_figures.expert_groups(many, {(0, 0): 64}).tolist()[most - 1 :]
        == [most - 1] + [most] * 5
    )
    figure = token_figures.token_layer_heatmap(
        values, tokens.QUANTITIES["expert"], scope=SCOPE, groups=groups
    )
    assert np.array_equal(heat(figure).z, groups.to_numpy().reshape(2, 4), equal_nan=True)
    assert [list(row) for row in heat(figure).text] == [["3", "1", "", "1"], ["40", "7", "40", "2"]]
    scale, last = heat(figure).colorscale, heat(figure).zmax
    assert (heat(figure).zmin, last) == (-0.5, most + 0.5)
    assert scale[2 * 3][1] == theme.categories(False)[3] and scale[-1][1] == theme.hues(False)[-1]


def test_a_long_prompt_is_shown_in_part_and_says_so():
    n = 1300
    frame = pd.DataFrame(
        {
            "token_id": np.arange(n),
            "position": np.arange(n),
            "text": ["x"] * n,
            "layer": 0,
            "site": 0,
            "value": np.linspace(0, 1, n),
        }
    )
    figure = token_figures.token_layer_heatmap(
        frame, tokens.QUANTITIES["entropy"], scope=Scope(n), start=600
    )
    assert "tokens 601 to 856 of 1,300 shown" in caption(figure)
    assert click_points(figure)[0, 0][2] == 600
    assert len(figure.layout.xaxis.ticktext) <= 60
    assert figure.layout.xaxis.ticktext[0] == "600"
    # the window ends with the prompt, and many layers make it narrower
    assert token_figures.tokens_shown(1300, 1, start=9999) == range(1044, 1300)
    assert len(token_figures.tokens_shown(10**6, 256)) * 256 <= heatmap.MAX_CELLS
    assert token_figures.tokens_shown(3, 10) == range(3)


def test_scales_end_at_what_was_observed():
    scale = token_figures.quantity_scale
    assert scale(pd.Series([0.2, 3.5, np.nan]), tokens.QUANTITIES["margin"])[1:3] == (0.2, 3.5)
    nothing = scale(pd.Series([np.nan]), tokens.QUANTITIES["entropy"])
    assert nothing.low < nothing.high


def test_score_bars_hold_the_scores(run):
    frame = tokens.token_scores(run, 3, 1)
    figure = token_figures.score_bars(
        frame, layer="1", token_text=" not", unit="logit", baseline=0.5
    )
    got = {
        int(ids[0]): (x, y, part.name)
        for part in figure.data
        for ids, x, y in zip(part.customdata, part.x, part.y, strict=True)
    }
    for row in frame.to_dict("records"):
        _, score, name = got[row["expert_id"]]
        assert score == row["score"]
        assert name == ("not chosen" if pd.isna(row["slot"]) else "chosen")
    in_order = sorted(got, key=lambda expert: got[expert][0])
    scores = [got[expert][1] for expert in in_order]
    assert scores == sorted(scores, reverse=True)
    assert [int(text) for text in figure.layout.xaxis.ticktext] == in_order
    assert "(logit)" in title(figure) and "·not" in caption(figure)
    assert figure.layout.shapes[0].y0 == 0.5


def test_scores_that_were_not_recorded_are_not_drawn(run):
    with pytest.raises(ExplorerError, match="sample-tokens"):
        token_figures.score_bars(
            tokens.token_scores(run, 4, 1), layer="1", token_text="x", unit="logit"
        )


def test_token_routes_hold_the_weights(run):
    frame = tokens.token_experts(run, 3)
    figure = token_figures.token_routes(frame, token_text="x", pins=[(1, 0, 2)])
    got = {
        (int(ids[0]), int(ids[1]), int(ids[2])): (x, ids[3], color, text)
        for part in figure.data
        for ids, x, color, text in zip(
            part.customdata, part.x, part.marker.color, part.text, strict=True
        )
    }
    assert len(got) == len(frame)
    for row in frame.to_dict("records"):
        key = (row["layer"], row["site"], row["expert_id"])
        share, weight, color, text = got[key]
        assert (share, weight) == pytest.approx((row["weight_share"], row["weight"]))
        assert text == str(row["expert_id"])
        assert (color == theme.hues(False)[0]) == (key == (1, 0, 2))


# ---- the same figures, of the Python API


def test_figures_of_the_api_are_those_of_the_pages(run):
    every = load.expert_load(run, domain="law", phase="prompt")
    n_tokens = token_count(run, domain="law", phase="prompt")
    scope = Scope(n_tokens, "law", "prompt")
    chosen = {"domain": "law", "phase": "prompt", "dark": True}
    table = load.balance_table(every, n_tokens=n_tokens)
    here = load.expert_load(run, layer=3, site=1, domain="law", phase="prompt")
    of_page = [
        load_figures.load_heatmap(every, scope=scope, dark=True),
        load_figures.load_bars(here, scope=scope, layer="3.1", dark=True),
        load_figures.lorenz(here, scope=scope, layer="3.1", dark=True),
        load_figures.balance_over_layers(table, "gini", scope=scope, dark=True),
    ]
    of_api = [
        api.load_heatmap(run, **chosen),
        api.load_bars(run, 3, site=1, **chosen),
        api.lorenz(run, 3, site=1, **chosen),
        api.load_over_layers(run, "gini", **chosen),
    ]
    for page, call in zip(of_page, of_api, strict=True):
        assert page.to_json() == call.to_json()
    assert "law" in caption(api.flow(run, domain="law"))
    pairs = api.coactivation(run, 1)
    assert title(pairs) and title(api.transitions(run, 1))
    cells = api.token_heatmap(run, 0, "expert")
    assert "8 tokens" in caption(cells) and "8 tokens" in caption(api.token_heatmap(run))
    for wrong, reason in (
        (lambda: api.coactivation(run, 3, site=1), "one expert per token"),
        (lambda: api.flow(run, 3), "No router follows layer 3"),
        (lambda: api.lorenz(run, 2), "no router 0"),
        (lambda: api.token_heatmap(run, 99), "no tokens of prompt 99"),
    ):
        with pytest.raises(RunError, match=reason):
            wrong()


def test_figures_of_the_api_import_no_streamlit():
    """They are for notebooks: modules are imported anew, with Streamlit out of reach."""
    known = dict(sys.modules)
    try:
        for name in known:
            if name.split(".")[0] in ("explorer", "streamlit"):
                del sys.modules[name]
        sys.modules["streamlit"] = None
        fresh = importlib.import_module("explorer.figures")
        assert fresh is not api and "explorer.ui.theme" in sys.modules
    finally:
        sys.modules.clear()
        sys.modules.update(known)

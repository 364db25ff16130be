"""Pairs of experts: queries, metrics and figures against plain Python over the same rows."""

import duckdb
import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import NASTY, SITES, write_run

from explorer.errors import MetricError, RunError
from explorer.metrics import coactivation as metrics
from explorer.pages.flow import data as queries
from explorer.pages.flow import figures
from explorer.run import open_run
from explorer.ui import theme
from explorer.ui.wording import Scope

FILTERS = [{}, {"domain": "law"}, {"domain": ""}, {"phase": "generated"}, {"domain": "nowhere"}]
SCOPE = Scope(33)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "known.duckdb")


@pytest.fixture(scope="module")
def run(known):
    with open_run(known.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A run at level stats."""
    written = write_run(tmp_path_factory.mktemp("run") / "stats.duckdb", level="stats")
    with open_run(written.path) as opened:
        yield opened


def met(known, first, second, **where):
    """Count by loops how many tokens chose each expert of one site and each of another."""
    counts = {}
    ids = {token["token_id"] for token, *_ in known.assignments(**where)}
    for token in ids:
        for a, _ in known.routes[token, *first]["experts"]:
            for b, _ in known.routes[token, *second]["experts"]:
                counts[a, b] = counts.get((a, b), 0) + 1
    return counts


def cells_of(table):
    return {(a, b): int(table[a, b]) for a, b in np.argwhere(table).tolist()}


# ---- queries


def test_transitions_join_the_last_routers_of_layers(run):
    assert queries.last_sites(run) == [SITES[0], SITES[2]]
    with pytest.raises(RunError, match="another MoE layer after it, got layer 3"):
        queries.transitions(run, 3)


@pytest.mark.parametrize("where", FILTERS, ids=str)
def test_transitions(run, known, where):
    found = queries.transitions(run, 1, **where)
    assert found.tokens.shape == (6, 4)
    assert cells_of(found.tokens) == met(known, (1, 0), (3, 1), **where)
    matching = {token["token_id"] for token, *_ in known.assignments(**where)}
    assert found.n_tokens == found.n_all == len(matching)


@pytest.mark.parametrize("where", FILTERS, ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_coactivation(run, known, site, where):
    place = site.layer, site.site
    found = queries.coactivation(run, site.layer, site=site.site, **where)
    assert cells_of(found.tokens) == met(known, place, place, **where)
    assert np.array_equal(found.tokens, found.tokens.T)


def test_a_filter_on_many_tokens_counts_every_nth(run, known, monkeypatch):
    monkeypatch.setattr(queries, "MAX_TOKENS", 10)
    found = queries.transitions(run, 1, phase="prompt")
    tokens = [t["token_id"] for t in known.tokens if t["phase"] == "prompt"]
    step = -(-len(tokens) // 10)
    counted = [token for token in tokens if token % step == 0]
    assert (found.n_tokens, found.n_all) == (len(counted), len(tokens))
    expected = {}
    for token in counted:
        for a, _ in known.routes[token, 1, 0]["experts"]:
            for b, _ in known.routes[token, 3, 1]["experts"]:
                expected[a, b] = expected.get((a, b), 0) + 1
    assert cells_of(found.tokens) == expected


def test_a_run_without_totals_is_counted_from_its_rows(known, tmp_path):
    copy = tmp_path / "copy.duckdb"
    copy.write_bytes(known.path.read_bytes())
    with duckdb.connect(str(copy)) as connection:
        connection.execute("DELETE FROM packed.transition; DELETE FROM packed.coactivation")
    with open_run(copy) as run:
        assert cells_of(queries.transitions(run, 1).tokens) == met(known, (1, 0), (3, 1))
        found = queries.coactivation(run, 3)
        assert cells_of(found.tokens) == met(known, (3, 0), (3, 0))


def test_without_ids_and_totals_the_answer_says_what_to_do(counted):
    with pytest.raises(RunError, match="--level ids"):
        queries.transitions(counted, 1, phase="prompt")
    assert queries.tokens_of_both(counted, (1, 0, 0), (3, 1, 0)).empty
    assert queries.both_count(counted, (1, 0, 0), (3, 1, 0)) == 0


@pytest.mark.parametrize("where", FILTERS, ids=str)
@pytest.mark.parametrize("second", [(3, 1), (1, 0)])
def test_tokens_of_two_experts(run, known, second, where):
    for a, b in [(0, 1), (2, 3), (1, 0)]:
        places = (1, 0, a), (*second, b)
        frame = queries.tokens_of_both(run, *places, limit=5, context=2, **where)
        expected = {}
        for token, _, expert, weight in known.assignments(1, 0, **where):
            if expert == a:
                there = dict(known.routes[token["token_id"], *second]["experts"])
                if b in there:
                    expected[token["token_id"]] = (weight, there[b])
        assert queries.both_count(run, *places, **where) == len(expected)
        order = sorted(expected, key=lambda t: (-expected[t][0] * expected[t][1], t))[:5]
        assert frame["token_id"].tolist() == order
        weights = list(zip(frame["first_weight"], frame["second_weight"], strict=True))
        assert weights == [expected[token] for token in order]
        for row in frame.itertuples():
            prompt = [t for t in known.tokens if t["prompt_id"] == row.prompt_id]
            prompt.sort(key=lambda token: token["position"])
            near = [t["text"] for t in prompt]
            at = row.position
            assert row.before == "".join(near[max(0, at - 2) : at])
            assert row.text == near[at]
            assert row.after == "".join(near[at + 1 : at + 3])


# ---- metrics


def test_uplift_on_paper():
    # 40 tokens: expert 0 goes on to 0 in 15 of 20 cases, where chance gives 10
    found = metrics.transition_uplift([[15, 5], [5, 15]])
    assert found.expected.tolist() == [[10, 10], [10, 10]]
    assert found.ratio.tolist() == [[1.5, 0.5], [0.5, 1.5]]


def test_cells_with_little_expected_have_no_ratio_whatever_was_counted():
    found = metrics.transition_uplift([[4, 0], [0, 96]])
    assert np.isnan(found.ratio[0]).all()
    assert found.ratio[1, 1] == pytest.approx(100 / 96)
    every = metrics.transition_uplift([[4, 0], [0, 96]], min_expected=0)
    assert every.ratio[0, 0] == 25 and every.ratio[0, 1] == 0
    assert np.isnan(metrics.transition_uplift(np.zeros((2, 3))).ratio).all()


tables = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 50), min_size=n, max_size=n), min_size=n, max_size=n)
)


@settings(max_examples=60)
@given(tables)
def test_expected_transitions_keep_both_loads(table):
    counts = np.array(table)
    expected = metrics.transition_uplift(counts).expected
    assert expected.sum(axis=0) == pytest.approx(counts.sum(axis=0))
    assert expected.sum(axis=1) == pytest.approx(counts.sum(axis=1))


@settings(max_examples=60)
@given(tables)
def test_expected_pairs_keep_the_loads_and_leave_out_the_diagonal(table):
    # as if every pair had also met at random: no expert is in more than half of the meetings
    counts = np.array(table) + np.array(table).T + 60
    np.fill_diagonal(counts, 10_000)
    found = metrics.pair_uplift(counts)
    assert np.isnan(np.diag(found.expected)).all() and np.isnan(np.diag(found.ratio)).all()
    np.fill_diagonal(counts, 0)
    if len(counts) > 2:
        sums = np.nansum(found.expected, axis=1)
        assert sums == pytest.approx(counts.sum(axis=1), rel=1e-3)


def test_random_partners_are_at_chance_where_the_product_of_loads_is_not():
    random = np.random.default_rng(0)
    popularity = np.array([4.0, 2, 1, 1, 1, 1])
    keys = np.log(popularity) + random.gumbel(size=(100_000, 6))
    chosen = np.argsort(-keys, axis=1)[:, :2]
    counts = np.zeros((6, 6), dtype=np.int64)
    np.add.at(counts, (chosen[:, 0], chosen[:, 1]), 1)
    counts = counts + counts.T
    load = counts.sum(axis=1)
    product = counts * counts.sum() / np.outer(load, load)
    off = ~np.eye(6, dtype=bool)
    # drawing without replacement is not quite quasi-independent, yet close; the product is far
    assert np.abs(np.log(metrics.pair_uplift(counts).ratio[off])).max() < 0.12
    assert np.abs(np.log(product[off])).max() > 0.3


def test_two_experts_that_only_meet_each_other():
    found = metrics.pair_uplift([[0, 30], [30, 0]])
    assert found.ratio[0, 1] == pytest.approx(1)
    assert np.isnan(metrics.pair_uplift(np.zeros((3, 3))).ratio).all()


@pytest.mark.parametrize("table", [[[1, 2], [3, 1]], [[1, 2, 3]], [[-1, 0], [0, 1]], [1, 2]])
def test_tables_that_are_none_are_refused(table):
    with pytest.raises(MetricError):
        metrics.pair_uplift(table)


def test_routing_change_on_paper():
    ids = [[0, 1], [1, 0], [1, 2], [3, -1], [-1, -1], [-1, -1]]
    change = metrics.routing_change(ids)
    assert np.isnan(change[0])
    assert change[1:5] == pytest.approx([0, 1 - 1 / 3, 1, 1])
    assert np.isnan(change[5])
    assert len(metrics.routing_change(np.zeros((0, 2), int))) == 0


# ---- figures


def pairs(tokens, within=False):
    table = np.array(tokens)
    uplift = metrics.pair_uplift if within else metrics.transition_uplift
    return figures.Pairs(table, uplift(table), "1", "1" if within else "2")


def heat(figure):
    return next(part for part in figure.data if isinstance(part, go.Heatmap))


def caption(figure):
    return figure.layout.title.subtitle.text.replace("<br>", "; ")


def test_the_heatmap_holds_the_ratios_and_its_clicks_the_experts():
    given = pairs([[30, 10, 0], [10, 30, 1]])
    figure = figures.pair_heatmap(given, scope=SCOPE, chosen=(1, 2))
    clicked = np.concatenate([p.customdata for p in figure.data if p.name and "cells" in p.name])
    assert len(clicked) == 6
    for a, b, tokens, ratio in clicked.tolist():
        assert tokens == given.tokens[int(a), int(b)]
        assert ratio == pytest.approx(given.uplift.ratio[int(a), int(b)], nan_ok=True)
    z = np.asarray(heat(figure).z)
    assert z[0, 0] == pytest.approx(np.log2(given.uplift.ratio[0, 0]))
    assert np.isnan(z[:, 2]).all()
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].y0) == (1.5, 0.5)
    assert "n = 33 tokens" in caption(figure)
    assert "product of both loads" in caption(figure) and "fewer than 5" in caption(figure)


def test_pairs_within_a_layer_have_no_diagonal():
    figure = figures.pair_heatmap(pairs([[90, 30], [30, 70]], within=True), scope=SCOPE)
    assert np.isnan(np.diag(np.asarray(heat(figure).z))).all()
    assert "diagonal" in caption(figure)


def test_many_experts_are_cut_to_the_busiest_and_the_caption_says_so():
    tokens = np.full((300, 300), 8)
    tokens[280] = 9
    figure = figures.pair_heatmap(pairs(tokens), scope=SCOPE)
    assert np.asarray(heat(figure).z).shape == (figures.MAX_SIDE, figures.MAX_SIDE)
    assert f"the {figures.MAX_SIDE} busiest" in caption(figure)
    clicked = np.asarray(next(p for p in figure.data if p.name == "cells").customdata)
    assert set(clicked[clicked[:, 2] == 9, 0]) == {280}


hops = st.integers(1, 3).flatmap(
    lambda n: st.lists(
        st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=3, max_size=3),
        min_size=n,
        max_size=n,
    )
)


@settings(max_examples=60)
@given(hops, st.integers(1, 10))
def test_drawn_and_folded_flows_are_all_tokens_of_a_step(tables, n_flows):
    given_hops = [pairs(table) for table in tables]
    flows = figures.top_flows(given_hops, n_flows)
    for number, hop in enumerate(given_hops):
        mine = [flow for flow in flows if flow.hop == number]
        assert sum(flow.tokens for flow in mine) == hop.tokens.sum()
        single = [flow for flow in mine if flow.target >= 0]
        assert len(single) == min(n_flows, int((hop.tokens > 0).sum()))
        smallest = min((flow.tokens for flow in single), default=0)
        drawn = {(flow.source, flow.target) for flow in single}
        for (a, b), tokens in np.ndenumerate(hop.tokens):
            assert (a, b) in drawn or tokens <= smallest
        for flow in single:
            assert flow.tokens == hop.tokens[flow.source, flow.target]
        # what leaves an expert that is drawn is all that leaves it
        for expert in {flow.source for flow in mine} - {-1}:
            out = sum(flow.tokens for flow in mine if flow.source == expert)
            assert out == hop.tokens[expert].sum()


def test_the_sankey_names_its_experts_and_its_share():
    given = [pairs([[60, 5], [5, 30]]), pairs([[40, 25], [5, 30]])]
    figure = figures.sankey(given, n_flows=2, scope=SCOPE)
    (drawn,) = figure.data
    names = list(drawn.node.label)
    flows = {
        (names[a], names[b]): value
        for a, b, value in zip(drawn.link.source, drawn.link.target, drawn.link.value, strict=True)
    }
    assert flows["L1.E0", "L2.E0"] == 60 and flows["L1.E0", "L2 rest"] == 5
    assert flows["L2.E1", "L2.E1"] == 30
    assert sum(flows.values()) == 200
    assert "2 largest flows of each step hold 80% of all" in caption(figure)
    assert "folded" in caption(figure)
    assert all(0 < place < 1 for place in (*drawn.node.x, *drawn.node.y))


def test_a_rest_that_would_bury_the_flows_is_not_drawn_and_the_caption_says_so():
    figure = figures.sankey([pairs(np.ones((20, 20), dtype=np.int64))], n_flows=4, scope=SCOPE)
    (drawn,) = figure.data
    assert len(drawn.link.value) == 4
    assert not any("rest" in name for name in drawn.node.label)
    assert "not drawn" in caption(figure) and "hold 1% of all" in caption(figure)


@pytest.mark.parametrize("dark", [False, True])
def test_bands_above_and_below_chance_differ_from_the_ground(dark):
    less, even, more = (
        figures._band_color(figures.Flow(0, 0, 0, 9, ratio), dark) for ratio in (0.3, 1.0, 3.0)
    )
    assert len({less, even, more}) == 3
    ends = theme.color_at(0, dark), theme.color_at(1, dark)
    assert ends[0] != ends[1]
    assert "#{:02x}{:02x}{:02x}".format(*ends[1]) == theme.diverging(dark)[-1][1]


def test_texts_of_a_prompt_come_back_as_they_are(run, known):
    token = next(t for t in known.tokens if t["text"] == NASTY)
    here = known.routes[token["token_id"], 1, 0]["experts"][0][0]
    there = known.routes[token["token_id"], 3, 0]["experts"][0][0]
    frame = queries.tokens_of_both(run, (1, 0, here), (3, 0, there))
    assert NASTY in frame["text"].tolist()
